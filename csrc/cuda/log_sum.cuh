// The logarithm of a sum of exponentials, over the threads of a block.
#pragma once

#include "../formulas/log_sums.h"
#include "sums.cuh"

namespace fastvae {

// A sum of exponentials, relative to the largest: 1 for that. `L` is the type of the logarithms.
template <class L, class T>
struct LogSum {
  L largest = -Constants<L>::infinity;
  T sum = 0;

  __device__ void add(L log) {
    if (log == -Constants<L>::infinity) return;
    if (log > largest) {
      sum = fma(sum, scale_to(log), T(1));
      largest = log;
    } else {
      sum += relative(log, largest);
    }
  }
  // Of what all threads of the block have.
  __device__ void combine() {
    const L all = group_reduce(largest, kBlockThreads, [](L a, L b) { return a > b ? a : b; });
    sum = group_sum(sum * scale_to(all), kBlockThreads);
    largest = all;
  }
  __device__ double log_sum() const { return log_of_sum(double(largest), double(sum)); }

 private:
  __device__ static T relative(L log, L total) { return weight(T(halvings(log, total))); }
  __device__ T scale_to(L log) const { return largest == log ? T(1) : relative(largest, log); }
};

}  // namespace fastvae
