// The CUDA loops over pairs of a row and a component (../pairs.h) for the marginals of a mixture: a
// warp for some rows, or components, and a dimension. As on the CPU (../cpu/marginals.h) rows that
// are far from all components are done again in double.
#pragma once

#include "../formulas/marginals.h"
#include "pairs.cuh"

namespace fastvae {

// Rows, or components, that a warp takes: what it reads of the other side serves all of them.
template <class T>
constexpr int kMarginalOwn = sizeof(T) == 4 ? 4 : 2;
constexpr int kWarps = kBlockThreads / kWarp;

// All by dimension, then by row or component.
template <class T>
struct Marginals {
  T *z, *factor;        // [size, rows]; backward what a row's weights are multiplied by
  T *mu, *root, *cost;  // [size, components]

  static int64_t numbers(const Pairs& p) { return (2 * p.rows + 3 * p.components) * p.size; }
  __host__ __device__ explicit Marginals(const Pairs& p)
      : z(static_cast<T*>(p.packed)),
        factor(z + p.rows * p.size),
        mu(factor + p.rows * p.size),
        root(mu + p.components * p.size),
        cost(root + p.components * p.size) {}
};

template <class T>
__device__ double log_weight_of(const Pairs& p, int64_t k) {
  const auto* weights = static_cast<const T*>(p.log_weights);
  return p.log_other + (weights ? double(weights[k]) : 0);
}

// What a row's weights are multiplied by, of the logarithm of their sum; -0 if, and only if, it is
// far.
template <class T>
__device__ T marginal_factor(double log_sum, double highest_log2, T grad) {
  const T sum = sum_of_marginal<T>(highest_log2, log_sum);
  return sum >= T(kFarSum) ? grad / sum + T(0) : T(-0.0);
}
template <class T>
__device__ bool is_far(T factor) {
  return as_int(factor) == as_int(T(-0.0));
}

// Blocks of a dimension, each with a part of the rows and of the components; of both, all look for
// the highest density. Backward each says behind the constants whether it has seen a row that is
// far.
constexpr int kPackBlocks = 4;

__host__ __device__ inline int64_t marginal_constants(const Pairs& p) {
  return p.size * (1 + kPackBlocks);
}
__device__ inline double* far_rows(const Pairs& p, int64_t d) {
  return p.constants + p.size + d * kPackBlocks;
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    pack_marginals(const __grid_constant__ Pairs p) {
  const Marginals<T> to(p);
  const Scale scale = scale_of(p);
  const int64_t d = blockIdx.x / kPackBlocks, n = p.components;
  const int part = int(blockIdx.x % kPackBlocks);
  const auto log2_of = [&](int64_t k) {
    const double s = static_cast<const T*>(p.s)[k * p.size + d];
    return highest_log2(scale, s, log_weight_of<T>(p, k));
  };
  double highest = -Constants<double>::infinity;
  for (int64_t k = threadIdx.x; k < n; k += kBlockThreads) {
    const double log2 = log2_of(k);
    highest = log2 > highest ? log2 : highest;
  }
  highest = group_reduce(highest, kBlockThreads, [](double a, double b) { return a > b ? a : b; });
  highest = shift_of(highest);
  if (threadIdx.x == 0) p.constants[d] = highest;
  const int64_t first = part * kBlockThreads + threadIdx.x, step = kPackBlocks * kBlockThreads;
  bool far = false;
  for (int64_t b = first; b < p.rows; b += step) {
    const int64_t place = d * p.rows + b;
    to.z[place] = static_cast<const T*>(p.z)[b * p.size + d];
    if (!p.grad) continue;
    const T grad = static_cast<const T*>(p.grad)[b];
    to.factor[place] = marginal_factor(p.log_sums[place], highest, grad);
    far |= is_far(to.factor[place]);
  }
  if (p.grad) {
    const int any = group_reduce(int(far), kBlockThreads, [](int a, int b) { return a | b; });
    if (threadIdx.x == 0) far_rows(p, d)[part] = any;
  }
  for (int64_t k = first; k < n; k += step) {
    to.mu[d * n + k] = static_cast<const T*>(p.mu)[k * p.size + d];
    to.root[d * n + k] = marginal_root(scale, static_cast<const T*>(p.s)[k * p.size + d]);
    to.cost[d * n + k] = T(highest - log2_of(k));
  }
}

// Which dimension a warp has, and which rows or components: those from `first` to `last`.
template <class T>
struct MarginalUnit {
  int64_t d, first, last;
  int lane;

  static constexpr int64_t kOfBlock = kWarps * kMarginalOwn<T>;
  static int64_t blocks(int64_t count, int64_t size) { return ceil_div(count, kOfBlock) * size; }
  __device__ MarginalUnit(int64_t block, int64_t count) {
    const int64_t blocks = ceil_div(count, kOfBlock);
    d = block / blocks;
    first = block % blocks * kOfBlock + threadIdx.x / kWarp * kMarginalOwn<T>;
    last = min(first + kMarginalOwn<T>, count);
    lane = int(threadIdx.x % kWarp);
  }
};

template <class T>
__device__ double far_log(const Pairs& p, double z, int64_t b, int64_t k, int64_t d) {
  const Scale scale = scale_of(p);
  const double mu = static_cast<const T*>(p.mu)[k * p.size + d];
  const double s = static_cast<const T*>(p.s)[k * p.size + d];
  return far_log_density(scale, z, mu, s) + log_weight_of<T>(p, k) + own_log(p, b, k);
}

// What a row that is far gives to the logarithm of a component.
template <class T>
__device__ T far_share(const Pairs& p, double z, int64_t b, int64_t k, int64_t d) {
  const double log = far_log<T>(p, z, b, k, d);
  if (log == -Constants<double>::infinity) return 0;
  return T(share_of_all(log, p.log_sums[d * p.rows + b])) * static_cast<const T*>(p.grad)[b];
}

// Partners of a thread whose numbers are loaded at once.
template <class T>
constexpr int kPartners = sizeof(T) == 4 ? 8 : 4;

// The rows of a warp with all components, which its threads share out; no barrier concerns them.
template <class T>
struct MarginalRows {
  static constexpr int kOwn = kMarginalOwn<T>;
  const Pairs& p;
  const MarginalUnit<T>& unit;
  const Marginals<T> from;
  T z[kOwn];

  __device__ MarginalRows(const Pairs& p, const MarginalUnit<T>& unit) : p(p), unit(unit), from(p) {
#pragma unroll
    for (int o = 0; o < kOwn; ++o)
      z[o] = from.z[unit.d * p.rows + min(unit.first + o, unit.last - 1)];
  }

  // Calls f(o, w, mu, root) for a thread's pairs.
  template <class F>
  __device__ void each_pair(F f) const {
    constexpr int kAtOnce = kPartners<T> / 2;
    const bool own_differs = p.log_own != p.log_other;
    const T own_weight = own_differs ? own_factor<T>(p.log_own, p.log_other) : T(1);
    const int64_t n = p.components, place = unit.d * n;
    for (int64_t k0 = unit.lane; k0 < n; k0 += kAtOnce * kWarp) {
      T mu[kAtOnce], root[kAtOnce], cost[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t k = k0 + i * kWarp, there = place + min(k, n - 1);
        mu[i] = from.mu[there], root[i] = from.root[there];
        cost[i] = k < n ? from.cost[there] : Constants<T>::infinity;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t k = k0 + i * kWarp;
        const bool owns = own_differs && k / kWarp == unit.first / kWarp;
#pragma unroll
        for (int o = 0; o < kOwn; ++o) {
          T w = marginal_weight(cost[i], z[o], mu[i], root[i]);
          if (owns) w *= k == unit.first + o ? own_weight : T(1);
          f(o, w, mu[i], root[i]);
        }
      }
    }
  }

  // Of one row, in double.
  __device__ LogSum<double, double> far_sum(int o) const {
    LogSum<double, double> sum;
    for (int64_t k = unit.lane; k < p.components; k += kWarp)
      sum.add(far_log<T>(p, z[o], unit.first + o, k, unit.d));
    sum.combine(kWarp);
    return sum;
  }
};

// The logarithms of rows' sums.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    marginal_values(const __grid_constant__ Pairs p) {
  constexpr int kOwn = kMarginalOwn<T>;
  const MarginalUnit<T> unit(blockIdx.x, p.rows);
  if (unit.first >= unit.last) return;
  const MarginalRows<T> rows(p, unit);
  T sum[kOwn] = {};
  rows.each_pair([&](int o, T w, T, T) { sum[o] += w; });
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    sum[o] = group_sum(sum[o], kWarp);
    if (unit.first + o >= unit.last) continue;
    const double log_sum = sum[o] >= T(kFarSum) ? log_of_marginal(p.constants[unit.d], sum[o])
                                                : rows.far_sum(o).log_sum();
    if (unit.lane == 0) p.log_sums[unit.d * p.rows + unit.first + o] = log_sum;
  }
}

// The gradients of z.
template <class T>
__device__ void gradients_of_marginal_rows(const Pairs& p, const MarginalUnit<T>& unit) {
  constexpr int kOwn = kMarginalOwn<T>;
  const MarginalRows<T> rows(p, unit);
  const Marginals<T>& from = rows.from;
  const int64_t n = p.components, d = unit.d;
  T factor[kOwn], gradient[kOwn] = {};
#pragma unroll
  for (int o = 0; o < kOwn; ++o)
    factor[o] = from.factor[d * p.rows + min(unit.first + o, unit.last - 1)];
  rows.each_pair([&](int o, T w, T mu, T root) {
    gradient[o] = add_gradient_of_z(gradient[o], w, rows.z[o], mu, root * root);
  });
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int64_t b = unit.first + o;
    if (b >= unit.last) continue;
    gradient[o] = is_far(factor[o]) ? T(0) : gradient[o] * factor[o];
    if (is_far(factor[o])) {
      for (int64_t k = unit.lane; k < n; k += kWarp) {
        const T w = far_share<T>(p, rows.z[o], b, k, d), root = from.root[d * n + k];
        gradient[o] = add_gradient_of_z(gradient[o], w, rows.z[o], from.mu[d * n + k], root * root);
      }
    }
    gradient[o] = group_sum(gradient[o], kWarp);
    if (unit.lane == 0)
      static_cast<T*>(p.grad_z)[b * p.size + d] = gradient[o] * T(kMarginalPrecision);
  }
}

// Components' gradients; a warp's threads share out the rows.
template <class T>
__device__ void gradients_of_marginal_components(const Pairs& p, const MarginalUnit<T>& unit) {
  constexpr int kOwn = kMarginalOwn<T>;
  const Marginals<T> from(p);
  const int64_t d = unit.d, n = p.components, rows = p.rows;
  T mu[kOwn], root[kOwn], cost[kOwn];
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int64_t place = d * n + min(unit.first + o, unit.last - 1);
    mu[o] = from.mu[place], root[o] = from.root[place], cost[o] = from.cost[place];
  }
  const bool own_differs = p.log_own != p.log_other;
  const T own_weight = own_differs ? own_factor<T>(p.log_own, p.log_other) : T(1);
  Total<T> total[kOwn][3];
  constexpr int kAtOnce = kPartners<T>;  // whose sums are in T
  for (int64_t b0 = unit.lane; b0 < rows; b0 += kAtOnce * kWarp) {
    T z[kAtOnce], factor[kAtOnce], weights[kOwn] = {};
    ComponentSums<T> sums[kOwn] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t b = b0 + i * kWarp, there = d * rows + min(b, rows - 1);
      z[i] = from.z[there];
      factor[i] = b < rows ? from.factor[there] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t b = b0 + i * kWarp;
      const bool owned = own_differs && b / kWarp == unit.first / kWarp;
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        T w = marginal_weight(cost[o], z[i], mu[o], root[o]) * factor[i];
        if (owned) w *= b == unit.first + o ? own_weight : T(1);
        weights[o] += w;
        sums[o].add(w, z[i], mu[o]);
      }
    }
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      total[o][0].add(weights[o]);
      total[o][1].add(sums[o].first);
      total[o][2].add(sums[o].second);
    }
  }
  double far = 0;
  for (int i = 0; i < kPackBlocks; ++i) far += far_rows(p, d)[i];
  for (int64_t b = unit.lane; far > 0 && b < rows; b += kWarp) {
    if (!is_far(from.factor[d * rows + b])) continue;
    const T z = from.z[d * rows + b];
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const T w = far_share<T>(p, z, b, min(unit.first + o, unit.last - 1), d);
      ComponentSums<T> sums = {};
      sums.add(w, z, mu[o]);
      total[o][0].add(w);
      total[o][1].add(sums.first);
      total[o][2].add(sums.second);
    }
  }
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int64_t k = unit.first + o, place = k * p.size + d;
    double sum[3];
    for (int i = 0; i < 3; ++i) sum[i] = group_sum(total[o][i].value(), kWarp);
    if (unit.lane || k >= unit.last) continue;
    const double inverse_sigma = root[o] / kMarginalRoot;
    const double s = static_cast<const T*>(p.s)[place];
    if (p.grad_mu) static_cast<T*>(p.grad_mu)[place] = T(gradient_of_mu(sum[1], inverse_sigma));
    if (p.grad_s)
      static_cast<T*>(p.grad_s)[place] =
          T(gradient_of_s(scale_of(p), s, sum[2], sum[0], inverse_sigma));
    if (p.grad_log_weights) p.of_weights[d * n + k] = sum[0];
  }
}

// Blocks [0, row_blocks) are for rows, the others for components.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    marginal_gradients(const __grid_constant__ Pairs p, int64_t row_blocks) {
  const bool rows = blockIdx.x < row_blocks;
  const MarginalUnit<T> unit(blockIdx.x - (rows ? 0 : row_blocks), rows ? p.rows : p.components);
  if (unit.first >= unit.last) return;
  if (rows)
    gradients_of_marginal_rows(p, unit);
  else
    gradients_of_marginal_components(p, unit);
}

// to[i] = sum over dimensions of from[d, i].
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    add_dimensions(const double* from, int64_t n, int64_t size, T* to) {
  const int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= n) return;
  double sum = 0;
  for (int64_t d = 0; d < size; ++d) sum += from[d * n + i];
  to[i] = T(sum);
}

}  // namespace fastvae
