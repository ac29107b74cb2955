#include "loops.cuh"

namespace fastvae {
const CudaKernels kLatentsFloat64 = make_kernels<double>(StepsOf<LatentOps>{});
const CudaKernels kDataFloat64 = make_kernels<double>(StepsOf<DataOps>{});
const CudaKernels kCountsFloat64 = make_kernels<double>(StepsOf<CountOps>{});
}  // namespace fastvae
