// The table of CUDA kernels: a file for each type, or for both half types, fills one column.
#pragma once

#include <cuda_runtime_api.h>

#include "cut.h"

namespace fastvae {

#ifdef __CUDACC__
// All launches are made here, so that the tests can put a loop over host threads in its place
// (tests/cuda_on_host).
template <class... Params, class... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), unsigned blocks, unsigned threads,
                          cudaStream_t stream, const Args&... args) {
  kernel<<<blocks, threads, 0, stream>>>(args...);
  return cudaGetLastError();
}
#endif

using CudaLaunch = cudaError_t (*)(Sums sums, const Plan& plan, const Cut& cut,
                                   cudaStream_t stream);

// One for each of `Steps` (formulas/all.h).
struct CudaColumn {
  const CudaLaunch* launch;
};

extern const CudaColumn kCudaFloat32, kCudaFloat64, kCudaHalves;

}  // namespace fastvae
