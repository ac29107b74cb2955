#include "loops.cuh"

namespace fastvae {
const CudaKernels kLatentsHalves = make_kernels<HalfBits>(StepsOf<LatentOps>{});
}
