// The table of CUDA kernels: a file for each type fills one column.
#pragma once

#include <cuda_runtime_api.h>

#include "../plan.h"

namespace fastvae {

using CudaLaunch = cudaError_t (*)(const Plan& plan, cudaStream_t stream);

struct CudaColumn {
  CudaLaunch launch[kSteps];
};

extern const CudaColumn kCudaFloat32, kCudaFloat64, kCudaBFloat16, kCudaFloat16;

}  // namespace fastvae
