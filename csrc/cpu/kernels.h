// The table that one instruction set offers. Plain data: safe to include under any compiler flags.
#pragma once

#include "../categoricals.h"
#include "../colours.h"
#include "../items.h"
#include "../pairs.h"
#include "../plan.h"

namespace fastvae {

using Kernel = void (*)(const Plan& plan, int64_t begin, int64_t end, int64_t slot);

constexpr int kPanel = 16;  // components side by side, as many as a vector has lanes

// A loop over pairs: what it does, each for a range of so many units.
struct PairKernels {
  struct Part {
    int64_t (*units)(const Pairs& pairs);
    void (*run)(const Pairs& pairs, int64_t begin, int64_t end);
  };
  int64_t (*packed_size)(const Pairs& pairs);
  int64_t (*totals)(const Pairs& pairs);  // of a panel, backward
  Part pack, rows, components;
};

// A row for each of `Steps` (formulas/all.h).
struct KernelTable {
  const Kernel (*kernel)[kDTypes];
};
using ColourKernel = void (*)(const Colours& colours, int64_t begin, int64_t end);
using ItemKernel = void (*)(const Items& items, int64_t begin, int64_t end);
using CategoricalKernel = void (*)(const Categoricals& categoricals, int64_t begin, int64_t end);

// Of the loops that end in the logarithm of a sum.
struct LogSumTable {
  const PairKernels (*pairs)[2];     // a row for each PairValue, of float32 and float64
  const ItemKernel* items;           // for each DType
  const ColourKernel (*colours)[2];  // of one channel and of three; of float32 and float64
  const CategoricalKernel *straight_through, *categorical_kl;  // for each DType
};

// What the processors of x86 before AVX2 have, without fused multiply-adds, is slower than PyTorch.
#if FASTVAE_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const LogSumTable kAvx2LogSums;
extern const LogSumTable kAvx512LogSums;
#else
extern const KernelTable kBaselineKernels;
extern const LogSumTable kBaselineLogSums;
#endif

}  // namespace fastvae
