// The CUDA side of a call. Without USE_CUDA there is none, and nobody calls.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace fastvae {

#ifdef USE_CUDA
constexpr bool kHasCuda = true;
// On `device`, which must be current, and its current stream. `op` names the op if the launch
// fails.
void run_on_cuda(const char* op, int device, int step, DType dtype, const Plan& plan);
// As add_on_cpu.
void add_on_cuda(const char* op, int device, DType accumulate, const void* from, int64_t stride,
                 int64_t count, int64_t step, void* to, int64_t n);
#else
constexpr bool kHasCuda = false;
inline void run_on_cuda(const char*, int, int, DType, const Plan&) {}
inline void add_on_cuda(const char*, int, DType, const void*, int64_t, int64_t, int64_t, void*,
                        int64_t) {}
#endif

// In the tests' build of tests/cuda_on_host the CUDA loops run on the CPU, for CPU tensors.
#ifdef FASTVAE_CUDA_ON_HOST
constexpr bool kCudaOnHost = true;
#else
constexpr bool kCudaOnHost = false;
#endif

}  // namespace fastvae
