#include "loops.cuh"

namespace fastvae {
const CudaKernels kDataFloat32 = make_kernels<float>(StepsOf<DataOps>{});
}
