// What every launch needs of PyTorch, and what becomes of its errors.
#pragma once

#include <cuda_runtime_api.h>

namespace fastvae {

cudaStream_t current_stream(const char* op, int device);

// Throws, naming the op, unless all is well.
void check(cudaError_t error, const char* op);

}  // namespace fastvae
