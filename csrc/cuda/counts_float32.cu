#include "loops.cuh"

namespace fastvae {
const CudaKernels kCountsFloat32 = make_kernels<float>(StepsOf<CountOps>{});
}
