// The tables of CUDA kernels. The ops are in parts, which are files of their own, so that many
// processors may compile them at once.
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

// Of the steps of a part of the ops, in their order (formulas/all.h).
struct CudaKernels {
  const CudaLaunch* launch;
  int count;
};

extern const CudaKernels kLatentsFloat32, kDataFloat32, kCountsFloat32;
extern const CudaKernels kLatentsFloat64, kDataFloat64, kCountsFloat64;
extern const CudaKernels kLatentsHalves, kDataHalves, kCountsHalves;

}  // namespace fastvae
