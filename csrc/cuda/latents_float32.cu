#include "loops.cuh"

namespace fastvae {
const CudaKernels kLatentsFloat32 = make_kernels<float>(StepsOf<LatentOps>{});
}
