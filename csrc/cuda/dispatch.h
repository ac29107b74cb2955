// The CUDA side of a call. Without USE_CUDA there is none, and nobody calls.
#pragma once

#include <cstdint>

#include "../categoricals.h"
#include "../colours.h"
#include "../formulas/all.h"
#include "../items.h"
#include "../pairs.h"
#include "../plan.h"
#include "../scratch.h"

namespace fastvae {

#ifdef USE_CUDA
constexpr bool kHasCuda = true;
// On `device`, which must be current, and its current stream. `op` names the op if the launch
// fails. Of a plan only what says where operands lie is read; the cut is made here.
void run_on_cuda(const char* op, int device, int index, const Step& step, DType dtype,
                 const Plan& plan, const Scratch& scratch);
void run_pairs_on_cuda(const char* op, int device, PairValue value, DType dtype, Pairs pairs,
                       const Scratch& scratch);
void run_items_on_cuda(const char* op, int device, DType dtype, const Items& items);
void run_straight_through_on_cuda(const char* op, int device, DType dtype,
                                  const Categoricals& categoricals);
void run_categorical_kl_on_cuda(const char* op, int device, DType dtype,
                                const Categoricals& categoricals);
void run_colours_on_cuda(const char* op, int device, DType dtype, Colours colours, void* value,
                         const Scratch& scratch);
// Multiplies `n` numbers by the one at `factor`, float32 or float64; leaves them if that is 1.
void scale_on_cuda(const char* op, int device, DType dtype, void* data, int64_t n,
                   DType factor_dtype, const void* factor);
#else
constexpr bool kHasCuda = false;
inline void run_on_cuda(const char*, int, int, const Step&, DType, const Plan&, const Scratch&) {}
inline void run_pairs_on_cuda(const char*, int, PairValue, DType, Pairs, const Scratch&) {}
inline void run_items_on_cuda(const char*, int, DType, const Items&) {}
inline void run_straight_through_on_cuda(const char*, int, DType, const Categoricals&) {}
inline void run_categorical_kl_on_cuda(const char*, int, DType, const Categoricals&) {}
inline void run_colours_on_cuda(const char*, int, DType, Colours, void*, const Scratch&) {}
inline void scale_on_cuda(const char*, int, DType, void*, int64_t, DType, const void*) {}
#endif

// In the tests' build of tests/cuda_on_host the CUDA loops run on the CPU, for CPU tensors.
#ifdef FASTVAE_CUDA_ON_HOST
constexpr bool kCudaOnHost = true;
#else
constexpr bool kCudaOnHost = false;
#endif

}  // namespace fastvae
