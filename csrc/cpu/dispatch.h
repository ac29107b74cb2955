// The CPU's side of a call: which instruction set, how many threads.
#pragma once

#include <cstdint>

#include "../categoricals.h"
#include "../colours.h"
#include "../items.h"
#include "../pairs.h"
#include "../plan.h"
#include "../scratch.h"

namespace fastvae {

// "avx512" or "avx2", elsewhere than on x86 "baseline": the best that the processor has, or what
// FASTVAE_CPU_CAPABILITY asks for if that is no more. "none" if there are no kernels for it.
const char* cpu_capability();

// Asks for large pages behind `bytes` of fresh memory, if that is worth it.
void use_large_pages(void* data, int64_t bytes);

void run_on_cpu(int step, DType dtype, const Plan& plan);

// The values, or backward the gradients, of float32 or float64.
void run_pairs_on_cpu(PairValue value, DType dtype, Pairs pairs, const Scratch& scratch);

void run_items_on_cpu(DType dtype, const Items& items);
void run_straight_through_on_cpu(DType dtype, const Categoricals& categoricals);
void run_categorical_kl_on_cpu(DType dtype, const Categoricals& categoricals);
// Of float32 or float64. `value`: [rows], forward.
void run_colours_on_cpu(DType dtype, Colours colours, void* value, const Scratch& scratch);

// to[i] = sum over j < count of from[i * stride + j * step], in double, in this order. Both types
// are float32 or float64.
void add_on_cpu(DType from_type, const void* from, int64_t stride, int64_t count, int64_t step,
                DType to_type, void* to, int64_t n);

}  // namespace fastvae
