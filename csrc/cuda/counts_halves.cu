#include "loops.cuh"

namespace fastvae {
const CudaKernels kCountsHalves = make_kernels<HalfBits>(StepsOf<CountOps>{});
}
