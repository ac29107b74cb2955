#include "loops.cuh"

namespace fastvae {
const CudaKernels kDataHalves = make_kernels<HalfBits>(StepsOf<DataOps>{});
}
