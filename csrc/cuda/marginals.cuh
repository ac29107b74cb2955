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
  T *z, *factor;        // [size, rows]; what a row's weights are multiplied by, infinite if far
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

// A block for each dimension.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    pack_marginals(const __grid_constant__ Pairs p) {
  const Marginals<T> to(p);
  const Scale scale = scale_of(p);
  const int64_t d = blockIdx.x, n = p.components;
  const auto log2_of = [&](int64_t k) {
    const double s = static_cast<const T*>(p.s)[k * p.size + d];
    return highest_log2(scale, s, log_weight_of<T>(p, k));
  };
  for (int64_t b = threadIdx.x; b < p.rows; b += kBlockThreads)
    to.z[d * p.rows + b] = static_cast<const T*>(p.z)[b * p.size + d];
  double highest = -Constants<double>::infinity;
  for (int64_t k = threadIdx.x; k < n; k += kBlockThreads) {
    const double log2 = log2_of(k);
    highest = log2 > highest ? log2 : highest;
  }
  highest = group_reduce(highest, kBlockThreads, [](double a, double b) { return a > b ? a : b; });
  highest = shift_of(highest);
  if (threadIdx.x == 0) p.constants[d] = highest;
  for (int64_t k = threadIdx.x; k < n; k += kBlockThreads) {
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
  __device__ explicit MarginalUnit(int64_t count) {
    const int64_t blocks = ceil_div(count, kOfBlock);
    d = blockIdx.x / blocks;
    first = blockIdx.x % blocks * kOfBlock + threadIdx.x / kWarp * kMarginalOwn<T>;
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

// The logarithms of rows' sums, backward the gradients of z too. A warp's threads share out the
// components, and no barrier concerns them.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) marginal_rows(const __grid_constant__ Pairs p) {
  constexpr int kOwn = kMarginalOwn<T>;
  const Marginals<T> from(p);
  const MarginalUnit<T> unit(p.rows);
  const int64_t d = unit.d, n = p.components;
  if (unit.first >= unit.last) return;
  T z[kOwn];
#pragma unroll
  for (int o = 0; o < kOwn; ++o) z[o] = from.z[d * p.rows + min(unit.first + o, unit.last - 1)];
  const bool own_differs = p.log_own != p.log_other;
  const T own_weight = own_differs ? own_factor<T>(p.log_own, p.log_other) : T(1);
  // Calls f(o, w, mu, root) for a thread's pairs.
  const auto each_pair = [&](auto f) {
    for (int64_t k = unit.lane; k < n; k += kWarp) {
      const int64_t place = d * n + k;
      const T mu = from.mu[place], root = from.root[place], cost = from.cost[place];
      const bool has_own = own_differs && k >= unit.first && k < unit.last;
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        T w = marginal_weight(cost, z[o], mu, root);
        if (has_own && k == unit.first + o) w *= own_weight;
        f(o, w, mu, root);
      }
    }
  };
  T sum[kOwn] = {}, factor[kOwn], gradient[kOwn] = {};
  each_pair([&](int o, T w, T, T) { sum[o] += w; });
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    sum[o] = group_sum(sum[o], kWarp);
    factor[o] =
        p.grad ? static_cast<const T*>(p.grad)[min(unit.first + o, unit.last - 1)] / sum[o] : T(0);
  }
  if (p.grad) {
    each_pair([&](int o, T w, T mu, T root) {
      gradient[o] = add_gradient_of_z(gradient[o], w * factor[o], z[o], mu, root * root);
    });
  }
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int64_t b = unit.first + o;
    if (b >= unit.last) continue;
    double log_sum = log_of_marginal(p.constants[d], sum[o]);
    const bool far = !(sum[o] >= T(kFarSum));
    if (far) {
      LogSum<double, double> far_sum;
      for (int64_t k = unit.lane; k < n; k += kWarp) far_sum.add(far_log<T>(p, z[o], b, k, d));
      far_sum.combine(kWarp);
      log_sum = far_sum.log_sum();
      gradient[o] = 0;
      if (p.grad && far_sum.sum != 0) {
        const T of_row = T(static_cast<const T*>(p.grad)[b] / far_sum.sum);
        for (int64_t k = unit.lane; k < n; k += kWarp) {
          const T w = T(share(far_log<T>(p, z[o], b, k, d), far_sum.largest));
          const T root = from.root[d * n + k];
          gradient[o] =
              add_gradient_of_z(gradient[o], w * of_row, z[o], from.mu[d * n + k], root * root);
        }
      }
    }
    gradient[o] = group_sum(gradient[o], kWarp);
    if (unit.lane) continue;
    p.log_sums[d * p.rows + b] = log_sum;
    if (!p.grad) continue;
    from.factor[d * p.rows + b] = far ? T(Constants<T>::infinity) : factor[o];
    if (p.grad_z) static_cast<T*>(p.grad_z)[b * p.size + d] = gradient[o] * T(kMarginalPrecision);
  }
}

// Components' gradients; a warp's threads share out the rows. The weights' own gradients go where
// the logarithms of the sums were not needed: behind them.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    marginal_components(const __grid_constant__ Pairs p) {
  constexpr int kOwn = kMarginalOwn<T>;
  const Marginals<T> from(p);
  const MarginalUnit<T> unit(p.components);
  const int64_t d = unit.d, n = p.components, rows = p.rows;
  if (unit.first >= unit.last) return;
  T mu[kOwn], root[kOwn], cost[kOwn];
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int64_t place = d * n + min(unit.first + o, unit.last - 1);
    mu[o] = from.mu[place], root[o] = from.root[place], cost[o] = from.cost[place];
  }
  const bool own_differs = p.log_own != p.log_other;
  const T own_weight = own_differs ? own_factor<T>(p.log_own, p.log_other) : T(1);
  Total<T> total[kOwn][3];
  constexpr int64_t kAtOnce = 8;  // rows of a thread whose sums are in T
  for (int64_t b0 = unit.lane; b0 < rows; b0 += kAtOnce * kWarp) {
    T weights[kOwn] = {};
    ComponentSums<T> sums[kOwn] = {};
    for (int64_t b = b0; b < min(b0 + kAtOnce * kWarp, rows); b += kWarp) {
      const T z = from.z[d * rows + b], factor = from.factor[d * rows + b];
      const bool far = !(factor - factor == 0);
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        T w = 0;
        const int64_t k = unit.first + o;
        if (!far) {
          w = marginal_weight(cost[o], z, mu[o], root[o]) * factor;
          if (own_differs && b == k) w *= own_weight;
        } else if (k < unit.last) {
          const double log = far_log<T>(p, z, b, k, d);
          if (log != -Constants<double>::infinity)
            w = T(share_of_all(log, p.log_sums[d * rows + b])) * static_cast<const T*>(p.grad)[b];
        }
        weights[o] += w;
        sums[o].add(w, z, mu[o]);
      }
    }
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      total[o][0].add(weights[o]);
      total[o][1].add(sums[o].first);
      total[o][2].add(sums[o].second);
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
    if (p.grad_log_weights) p.log_sums[p.size * p.rows + d * n + k] = sum[0];
  }
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
