// Sums over the threads of a group that end in a logarithm.
#pragma once

#include "../formulas/log_sums.h"
#include "sums.cuh"

namespace fastvae {

// A sum with twice the digits (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B), since a
// GPU may compute doubles at a 64th of float32's rate, and is slow to convert to them.
template <class T>
struct Total {
  T high = 0, low = 0;

  __device__ void add(T x) {
    const T sum = high + x, added = sum - high;
    low += (high - (sum - added)) + (x - added);
    high = sum;
  }
  // What is lost by an infinite sum is no number.
  __device__ double value() const { return double(high) + (low - low == 0 ? double(low) : 0); }
};
template <>
struct Total<double> {
  double sum = 0;

  __device__ void add(double x) { sum += x; }
  __device__ double value() const { return sum; }
};

// A sum of exponentials, relative to the largest: 1 for that. `L` is the type of the logarithms.
template <class L, class T>
struct LogSum {
  L largest = -Constants<L>::infinity;
  T sum = 0;

  __device__ void add(L log) {
    if (log == -Constants<L>::infinity) return;
    if (log > largest) {
      sum = with_larger(sum, scale_to(log));
      largest = log;
    } else {
      sum += relative(log, largest);
    }
  }
  // Of what all threads of the group have.
  __device__ void combine(int threads) {
    const L all = group_reduce(largest, threads, [](L a, L b) { return a > b ? a : b; });
    sum = group_sum(sum * scale_to(all), threads);
    largest = all;
  }
  __device__ double log_sum() const { return log_of_sum(double(largest), double(sum)); }

  __device__ static T relative(L log, L total) { return weight(T(halvings(log, total))); }
  // What the sum is multiplied by when another is the largest.
  __device__ T scale_to(L log) const { return largest == log ? T(1) : relative(largest, log); }
};

}  // namespace fastvae
