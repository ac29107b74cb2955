// The table that one instruction set offers. Plain data: safe to include under any compiler flags.
#pragma once

#include "../plan.h"

namespace fastvae {

using Kernel = void (*)(const Plan& plan, int64_t begin, int64_t end, int64_t slot);

// A row for each of `Steps` (formulas/all.h).
struct KernelTable {
  const Kernel (*kernel)[kDTypes];
};

// What the processors of x86 before AVX2 have, without fused multiply-adds, is slower than PyTorch.
#if FASTVAE_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#else
extern const KernelTable kBaselineKernels;
#endif

}  // namespace fastvae
