// The CUDA loops over pairs of a row and a component (../pairs.h), but for marginals
// (marginals.cuh): a block for each row, and one for each component.
//
// The threads of a block first share out the other side, a partner each, for the densities; then
// the dimensions, for the gradients, with the partners' weights in shared memory. Neighbouring
// threads read neighbouring numbers both times, since all is there in both orders (Sides).
#pragma once

#include "../formulas/pairs.h"
#include "../pairs.h"
#include "kernels.h"
#include "log_sum.cuh"

namespace fastvae {

__device__ inline Scale scale_of(const Pairs& pairs) {
  Settings settings;
  settings.scale = pairs.scale;
  return settings;
}

// Rows or components: number d of number i is at [i * size + d] and, `across`, at [d * count + i].
template <class T>
struct Sides {
  const T* z;
  const T* mu;
  T *z_across, *mu_across, *root, *root_across;

  static int64_t numbers(const Pairs& p) { return (p.rows + 3 * p.components) * p.size; }
  __host__ __device__ explicit Sides(const Pairs& p)
      : z(static_cast<const T*>(p.z)),
        mu(static_cast<const T*>(p.mu)),
        z_across(static_cast<T*>(p.packed)),
        mu_across(z_across + p.rows * p.size),
        root(mu_across + p.components * p.size),
        root_across(root + p.components * p.size) {}
};

// Blocks [0, components) are for these, with the constants of a mixture; the others for the rows.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) pack_sides(const __grid_constant__ Pairs p) {
  const Sides<T> to(p);
  const int64_t size = p.size;
  if (blockIdx.x >= p.components) {
    const int64_t b = blockIdx.x - p.components;
    for (int64_t d = threadIdx.x; d < size; d += kBlockThreads)
      to.z_across[d * p.rows + b] = to.z[b * size + d];
    return;
  }
  const Scale scale = scale_of(p);
  const int64_t k = blockIdx.x;
  double constant = 0;
  for (int64_t d = threadIdx.x; d < size; d += kBlockThreads) {
    const T s = static_cast<const T*>(p.s)[k * size + d];
    const T root = precision_root(scale, s);
    to.mu_across[d * p.components + k] = to.mu[k * size + d];
    to.root[k * size + d] = to.root_across[d * p.components + k] = root;
    constant += log_constant(scale, s);
  }
  constant = group_sum(constant, kBlockThreads);
  if (threadIdx.x) return;
  const auto* weights = static_cast<const T*>(p.log_weights);
  p.constants[k] = constant + p.log_other + (weights ? double(weights[k]) : 0);
}

// Summed in T for eight dimensions and in double beyond, as the CPU does.
template <class T>
__device__ double log_density(const Pairs& p, int64_t b, int64_t k, const T* z, int64_t z_step,
                              const T* mu, const T* root, int64_t step) {
  double total = 0;
  for (int64_t d = 0; d < p.size; d += 8) {
    T sum = 0;
    const int64_t last = min(d + 8, p.size);
    for (int64_t j = d; j < last; ++j)
      sum = add_square(sum, z[j * z_step], mu[j * step], root[j * step]);
    total += sum;
  }
  const double own = b == k ? p.log_own - p.log_other : 0;
  return log_density(total, p.constants[k]) + own;
}

// The sums that threads have made of the same numbers, in the order of the threads.
template <class T>
__device__ T sum_of_parts(T x, int width, int parts) {
  __shared__ T box[kBlockThreads];
  __syncthreads();
  box[threadIdx.x] = x;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < parts; ++i) sum += box[i * width + int(threadIdx.x) % width];
  return sum;
}

// Dimensions [first, first + width) are shared out: each to as many threads as there are for it,
// its `parts`, which share out the partners.
struct Share {
  int64_t first;
  int width, parts, part;

  __device__ Share(int64_t first, int64_t size)
      : first(first),
        width(int(min(size - first, int64_t(kBlockThreads)))),
        parts(kBlockThreads / width),
        part(int(threadIdx.x) / width) {}
  __device__ int64_t dimension() const { return first + int(threadIdx.x) % width; }
};

// A row's value or values; backward the gradient of z, and what its weights are divided by.
template <class T, bool kEach>
__global__ void __launch_bounds__(kBlockThreads, 2) pair_rows(const __grid_constant__ Pairs p) {
  __shared__ T weights[kBlockThreads];
  const Sides<T> from(p);
  const int64_t b = blockIdx.x, n = p.components, size = p.size;
  const T* grad = static_cast<const T*>(p.grad);
  const auto log_of = [&](int64_t k) {
    return log_density(p, b, k, from.z + b * size, 1, from.mu_across + k, from.root_across + k, n);
  };
  LogSum<double, T> sum;
  T factor = 0;
  if (!kEach || !grad)
    for (int64_t k = threadIdx.x; k < n; k += kBlockThreads) {
      if (kEach)
        static_cast<T*>(p.value)[b * n + k] = T(log_of(k));
      else
        sum.add(log_of(k));
    }
  if constexpr (!kEach) {
    sum.combine();
    // Of no weight at all, nothing is a share.
    if (threadIdx.x == 0 && grad)
      p.log_sums[b] = sum.sum == 0 ? Constants<double>::infinity : sum.log_sum();
    if (threadIdx.x == 0 && !grad) static_cast<T*>(p.value)[b] = T(sum.log_sum());
    if (grad) factor = sum.sum == 0 ? T(0) : grad[b] / sum.sum;
  }
  if (!p.grad_z) return;
  for (int64_t first = 0; first < size; first += kBlockThreads) {
    const Share share(first, size);
    const int64_t d = share.dimension();
    const T z = from.z[b * size + d];
    T gradient = 0;
    for (int64_t k0 = 0; k0 < n; k0 += kBlockThreads) {
      const int64_t k = k0 + threadIdx.x;
      T w = 0;
      if (k < n)
        w = kEach          ? grad[b * n + k]
            : sum.sum == 0 ? T(0)
                           : weight(T(halvings(log_of(k), sum.largest))) * factor;
      __syncthreads();
      weights[threadIdx.x] = w;
      __syncthreads();
      const int count = int(min(n - k0, int64_t(kBlockThreads)));
      if (share.part < share.parts)
        for (int i = share.part; i < count; i += share.parts) {
          const int64_t place = (k0 + i) * size + d;
          gradient = add_gradient_of_z(gradient, weights[i], z, from.mu[place],
                                       from.root[place] * from.root[place]);
        }
    }
    gradient = sum_of_parts(gradient, share.width, share.parts);
    if (int(threadIdx.x) < share.width) static_cast<T*>(p.grad_z)[b * size + d] = gradient;
  }
}

// A component's gradients.
template <class T, bool kEach>
__global__ void __launch_bounds__(kBlockThreads, 2)
    pair_components(const __grid_constant__ Pairs p) {
  __shared__ T weights[kBlockThreads];
  const Sides<T> from(p);
  const int64_t k = blockIdx.x, size = p.size, n = p.components;
  const T* grad = static_cast<const T*>(p.grad);
  for (int64_t first = 0; first < size; first += kBlockThreads) {
    const Share share(first, size);
    const int64_t d = share.dimension();
    const T mu = from.mu[k * size + d];
    double own_weights = 0, total[2] = {};
    for (int64_t b0 = 0; b0 < p.rows; b0 += kBlockThreads) {
      const int64_t b = b0 + threadIdx.x;
      T w = 0;
      if (b < p.rows) {
        if constexpr (kEach) {
          w = grad[b * n + k];
        } else {
          const double log = log_density(p, b, k, from.z_across + b, p.rows, from.mu + k * size,
                                         from.root + k * size, 1);
          w = weight(at_least(T(0), T(halvings(log, p.log_sums[b])))) * grad[b];
        }
      }
      own_weights += w;
      __syncthreads();
      weights[threadIdx.x] = w;
      __syncthreads();
      const int count = int(min(p.rows - b0, int64_t(kBlockThreads)));
      ComponentSums<T> sums{0, 0};
      if (share.part < share.parts)
        for (int i = share.part; i < count; i += share.parts)
          sums.add(weights[i], from.z[(b0 + i) * size + d], mu);
      total[0] += sums.first;
      total[1] += sums.second;
    }
    const double all_weights = group_sum(own_weights, kBlockThreads);
    for (double& sum : total) sum = sum_of_parts(sum, share.width, share.parts);
    if (threadIdx.x == 0 && first == 0 && p.grad_log_weights)
      static_cast<T*>(p.grad_log_weights)[k] = T(all_weights);
    if (int(threadIdx.x) >= share.width) continue;
    const int64_t place = k * size + d;
    const double root = from.root[place], s = static_cast<const T*>(p.s)[place];
    if (p.grad_mu) static_cast<T*>(p.grad_mu)[place] = T(gradient_of_mu(total[0], root));
    if (p.grad_s)
      static_cast<T*>(p.grad_s)[place] =
          T(gradient_of_s(scale_of(p), s, total[1], all_weights, root));
  }
}

}  // namespace fastvae
