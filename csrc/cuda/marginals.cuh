// The CUDA loops over pairs of a row and a component (../pairs.h) for the marginals of a mixture: a
// block for each row, or component, and dimension. As on the CPU (../cpu/marginals.h) rows that are
// far from all components are done again in double.
#pragma once

#include "../formulas/marginals.h"
#include "pairs.cuh"

namespace fastvae {

// All by dimension, then by row or component.
template <class T>
struct Marginals {
  T *mu, *root, *cost;  // [size, components]
  T* factor;            // [size, rows]: what a row's weights are multiplied by; infinite if far
  const T* z;

  static int64_t numbers(const Pairs& p) { return (p.rows + 3 * p.components) * p.size; }
  __host__ __device__ explicit Marginals(const Pairs& p)
      : mu(static_cast<T*>(p.packed)),
        root(mu + p.components * p.size),
        cost(root + p.components * p.size),
        factor(cost + p.components * p.size),
        z(static_cast<const T*>(p.z)) {}
};

template <class T>
__device__ double log_weight_of(const Pairs& p, int64_t k) {
  const auto* weights = static_cast<const T*>(p.log_weights);
  return p.log_other + (weights ? double(weights[k]) : 0);
}
__device__ inline double own_log(const Pairs& p, int64_t b, int64_t k) {
  return b == k ? p.log_own - p.log_other : 0;
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

template <class T>
__device__ T near_weight(const Pairs& p, const Marginals<T>& from, T z, int64_t b, int64_t k,
                         int64_t d) {
  const int64_t place = d * p.components + k;
  const T w = marginal_weight(from.cost[place], z, from.mu[place], from.root[place]);
  return b == k && p.log_own != p.log_other ? w * own_factor<T>(p.log_own, p.log_other) : w;
}
template <class T>
__device__ double far_log(const Pairs& p, double z, int64_t b, int64_t k, int64_t d) {
  const Scale scale = scale_of(p);
  const double mu = static_cast<const T*>(p.mu)[k * p.size + d];
  const double s = static_cast<const T*>(p.s)[k * p.size + d];
  return far_log_density(scale, z, mu, s) + log_weight_of<T>(p, k) + own_log(p, b, k);
}

// A block for each row and dimension: the logarithm of its sum, backward the gradient of z too.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) marginal_rows(const __grid_constant__ Pairs p) {
  const Marginals<T> from(p);
  const int64_t b = blockIdx.x / p.size, d = blockIdx.x % p.size, n = p.components;
  const T z = from.z[b * p.size + d];
  T sum = 0;
  for (int64_t k = threadIdx.x; k < n; k += kBlockThreads) sum += near_weight(p, from, z, b, k, d);
  sum = group_sum(sum, kBlockThreads);
  const bool far = !(sum >= T(kFarSum));
  LogSum<double, double> far_sum;
  if (far) {
    for (int64_t k = threadIdx.x; k < n; k += kBlockThreads) far_sum.add(far_log<T>(p, z, b, k, d));
    far_sum.combine();
  }
  const double log_sum = far ? far_sum.log_sum() : log_of_marginal(p.constants[d], sum);
  if (threadIdx.x == 0) p.log_sums[d * p.rows + b] = log_sum;
  if (!p.grad) return;
  const T grad = static_cast<const T*>(p.grad)[b];
  const T factor = far ? T(far_sum.sum == 0 ? 0 : grad / far_sum.sum) : grad / sum;
  T gradient = 0;
  for (int64_t k = threadIdx.x; k < n; k += kBlockThreads) {
    const int64_t place = d * n + k;
    const T w = far && far_sum.sum == 0 ? T(0)
                : far                   ? T(share(far_log<T>(p, z, b, k, d), far_sum.largest))
                                        : near_weight(p, from, z, b, k, d);
    gradient = add_gradient_of_z(gradient, w * factor, z, from.mu[place],
                                 from.root[place] * from.root[place]);
  }
  gradient = group_sum(gradient, kBlockThreads);
  if (threadIdx.x) return;
  from.factor[d * p.rows + b] = far ? T(Constants<T>::infinity) : factor;
  if (p.grad_z) static_cast<T*>(p.grad_z)[b * p.size + d] = gradient * T(kMarginalPrecision);
}

// A block for each component and dimension. The weights' own gradients go where the logarithms of
// the sums were not needed: behind them.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    marginal_components(const __grid_constant__ Pairs p) {
  const Marginals<T> from(p);
  const int64_t k = blockIdx.x / p.size, d = blockIdx.x % p.size;
  const T mu = from.mu[d * p.components + k];
  double total[3] = {};
  for (int64_t b = threadIdx.x; b < p.rows; b += kBlockThreads) {
    const T z = from.z[b * p.size + d], factor = from.factor[d * p.rows + b];
    T w;
    if (factor - factor == 0) {
      w = near_weight(p, from, z, b, k, d) * factor;
    } else {
      const double log_sum = p.log_sums[d * p.rows + b];
      const double log = far_log<T>(p, z, b, k, d);
      const bool none = log == -Constants<double>::infinity;
      w = none ? T(0) : T(share_of_all(log, log_sum)) * static_cast<const T*>(p.grad)[b];
    }
    ComponentSums<T> sums{0, 0};
    sums.add(w, z, mu);
    total[0] += w;
    total[1] += sums.first;
    total[2] += sums.second;
  }
  for (double& sum : total) sum = group_sum(sum, kBlockThreads);
  if (threadIdx.x) return;
  const int64_t place = k * p.size + d;
  const double root = from.root[d * p.components + k] / kMarginalRoot;
  const double s = static_cast<const T*>(p.s)[place];
  if (p.grad_mu) static_cast<T*>(p.grad_mu)[place] = T(gradient_of_mu(total[1], root));
  if (p.grad_s)
    static_cast<T*>(p.grad_s)[place] = T(gradient_of_s(scale_of(p), s, total[2], total[0], root));
  if (p.grad_log_weights) p.log_sums[p.size * p.rows + d * p.components + k] = total[0];
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
