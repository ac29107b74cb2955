// The CUDA loops over pairs of a row and a component (../pairs.h), but for marginals
// (marginals.cuh): a block for some rows, or for some components.
//
// The threads of a block first share out the other side, a partner each, for the densities; then
// the dimensions, for the gradients, with the partners' weights in shared memory. What a thread
// reads of a partner it uses for all of the block's own, of which there are the more, the more
// blocks there are. What backward needs to know of a row forward has kept: so rows and components
// wait for each other in nothing, and are blocks of one launch.
#pragma once

#include "../dims.h"
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

__device__ inline double own_log(const Pairs& p, int64_t b, int64_t k) {
  return b == k ? p.log_own - p.log_other : 0;
}

// Rows or components in tiles of a warp's number of them, which both the threads that take one each
// and those that take several read as neighbours.
template <class T>
struct Tiles {
  T* data;
  int64_t size;

  __host__ __device__ static int64_t numbers(int64_t count, int64_t size) {
    return ceil_div(count, kWarp) * kWarp * size;
  }
  // The first number of i; the next dimension's is kWarp behind it.
  __device__ T* at(int64_t i) const { return data + (i / kWarp * size * kWarp + i % kWarp); }
};

// What is packed; number d of component k is at root[k * size + d] too.
template <class T>
struct Sides {
  const T *z, *mu;
  T* root;
  Tiles<T> z_tiles, mu_tiles, root_tiles;

  __host__ __device__ static int64_t tiles(const Pairs& p, int64_t count) {
    return Tiles<T>::numbers(count, p.size);
  }
  static int64_t numbers(const Pairs& p) {
    return tiles(p, p.rows) + 2 * tiles(p, p.components) + p.components * p.size;
  }
  __device__ explicit Sides(const Pairs& p)
      : z(static_cast<const T*>(p.z)),
        mu(static_cast<const T*>(p.mu)),
        z_tiles{static_cast<T*>(p.packed), p.size},
        mu_tiles{z_tiles.data + tiles(p, p.rows), p.size},
        root_tiles{mu_tiles.data + tiles(p, p.components), p.size} {
    root = root_tiles.data + tiles(p, p.components);
  }
};

// A warp for each component, with the constants of a mixture, and then for each row.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) pack_sides(const __grid_constant__ Pairs p) {
  const Sides<T> to(p);
  const int64_t size = p.size, k = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x % kWarp);
  if (k >= p.components) {
    const int64_t b = k - p.components;
    for (int64_t d = lane; b < p.rows && d < size; d += kWarp)
      to.z_tiles.at(b)[d * kWarp] = to.z[b * size + d];
    return;
  }
  const Scale scale = scale_of(p);
  double constant = 0;
  for (int64_t d = lane; d < size; d += kWarp) {
    const T s = static_cast<const T*>(p.s)[k * size + d];
    const T root = precision_root(scale, s);
    to.mu_tiles.at(k)[d * kWarp] = to.mu[k * size + d];
    to.root_tiles.at(k)[d * kWarp] = to.root[k * size + d] = root;
    constant += log_constant(scale, s);
  }
  constant = group_sum(constant, kWarp);
  if (lane) return;
  const auto* weights = static_cast<const T*>(p.log_weights);
  p.constants[k] = constant + p.log_other + (weights ? double(weights[k]) : 0);
}

// Of each of `kOwn` neighbours with one partner, the sum of all t^2: in T for eight dimensions, and
// with twice the digits beyond.
template <class T, int kOwn>
struct Squares {
  Total<T> total[kOwn];

  // `step(sums, d)` adds that of dimension d to each.
  template <class F>
  __device__ Squares(int64_t size, F step) {
    int64_t d = 0;
    constexpr int kLoads = kOwn > 2 ? 4 : 8;  // as many as there are registers for
    const auto chunk = [&](int count) {
      T sum[kOwn] = {};
#pragma unroll kLoads
      for (int j = 0; j < count; ++j) step(sum, d + j);
#pragma unroll
      for (int o = 0; o < kOwn; ++o) total[o].add(sum[o]);
      d += 8;
    };
    while (d + 8 <= size) chunk(8);
    if (d < size) chunk(int(size - d));
  }
};

__device__ inline double log_of_pair(const Pairs& p, int64_t b, int64_t k, double squares) {
  return log_density(squares, p.constants[k]) + own_log(p, b, k);
}

// A partner's number for each of the block's own: written and read as one.
template <class T, int kOwn>
struct alignas(kOwn * sizeof(T) < 16 ? kOwn * sizeof(T) : 16) Numbers {
  T x[kOwn];
};

// Of rows b0 and behind with component k.
template <class T, int kOwn>
__device__ Squares<T, kOwn> squares_of_rows(const Sides<T>& from, int64_t size, int64_t b0,
                                            int64_t k) {
  const T* z_own = from.z_tiles.at(b0);
  const T *mu = from.mu_tiles.at(k), *root = from.root_tiles.at(k);
  return Squares<T, kOwn>(size, [&](T(&sum)[kOwn], int64_t d) {
    const T m = mu[d * kWarp], r = root[d * kWarp];
    const auto z = *reinterpret_cast<const Numbers<T, kOwn>*>(z_own + d * kWarp);
#pragma unroll
    for (int o = 0; o < kOwn; ++o) sum[o] = add_square(sum[o], z.x[o], m, r);
  });
}

// Of components k0 and behind with row b.
template <class T, int kOwn>
__device__ Squares<T, kOwn> squares_of_components(const Sides<T>& from, int64_t size, int64_t k0,
                                                  int64_t b) {
  const T *mu_own = from.mu_tiles.at(k0), *root_own = from.root_tiles.at(k0);
  const T* z = from.z_tiles.at(b);
  return Squares<T, kOwn>(size, [&](T(&sum)[kOwn], int64_t d) {
    const T x = z[d * kWarp];
    const auto m = *reinterpret_cast<const Numbers<T, kOwn>*>(mu_own + d * kWarp);
    const auto r = *reinterpret_cast<const Numbers<T, kOwn>*>(root_own + d * kWarp);
#pragma unroll
    for (int o = 0; o < kOwn; ++o) sum[o] = add_square(sum[o], x, m.x[o], r.x[o]);
  });
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

constexpr int kInFlight = 8;  // partners whose numbers are loaded at once

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

// Rows' values, and the logarithms of a mixture's sums.
template <class T, bool kEach, int kOwn>
__global__ void __launch_bounds__(kBlockThreads, 2) pair_values(const __grid_constant__ Pairs p) {
  const Sides<T> from(p);
  const int64_t b0 = int64_t(blockIdx.x) * kOwn, n = p.components;
  const int own = int(min(p.rows - b0, int64_t(kOwn)));
  LogSum<double, T> sum[kOwn];
  for (int64_t k = threadIdx.x; k < n; k += kBlockThreads) {
    const auto squares = squares_of_rows<T, kOwn>(from, p.size, b0, k);
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const double log = log_of_pair(p, b0 + o, k, squares.total[o].value());
      if (!kEach)
        sum[o].add(log);
      else if (o < own)
        static_cast<T*>(p.value)[(b0 + o) * n + k] = T(log);
    }
  }
#pragma unroll
  for (int o = 0; !kEach && o < kOwn; ++o) {
    sum[o].combine(kBlockThreads);
    if (threadIdx.x || o >= own) continue;
    const double log_sum = sum[o].log_sum();
    static_cast<T*>(p.value)[b0 + o] = T(log_sum);
    p.log_sums[b0 + o] = kept_log_sum(log_sum, sum[o].sum);
  }
}

// The gradients of z.
template <class T, bool kEach, int kOwn>
__device__ void gradients_of_rows(const Pairs& p, int64_t b0,
                                  Numbers<T, kOwn> (&weights)[kBlockThreads]) {
  const Sides<T> from(p);
  const int64_t n = p.components, size = p.size;
  const int own = int(min(p.rows - b0, int64_t(kOwn)));
  const T* grad = static_cast<const T*>(p.grad);
  double log_sums[kOwn] = {};
  T upstream[kOwn] = {};
#pragma unroll
  for (int o = 0; !kEach && o < kOwn; ++o)
    if (o < own) log_sums[o] = p.log_sums[b0 + o], upstream[o] = grad[b0 + o];
  for (int64_t first = 0; first < size; first += kBlockThreads) {
    const Share share(first, size);
    const int64_t d = share.dimension();
    T z[kOwn], gradient[kOwn] = {};
#pragma unroll
    for (int o = 0; o < kOwn; ++o) z[o] = from.z[(b0 + min(o, own - 1)) * size + d];
    for (int64_t k0 = 0; k0 < n; k0 += kBlockThreads) {
      const int64_t k = k0 + threadIdx.x;
      Numbers<T, kOwn> w = {};
      if (k < n) {
        if constexpr (kEach) {
#pragma unroll
          for (int o = 0; o < kOwn; ++o)
            if (o < own) w.x[o] = grad[(b0 + o) * n + k];
        } else {
          const auto squares = squares_of_rows<T, kOwn>(from, size, b0, k);
#pragma unroll
          for (int o = 0; o < kOwn; ++o) {
            if (o >= own) continue;
            const double log = log_of_pair(p, b0 + o, k, squares.total[o].value());
            w.x[o] = narrow_share_of_all<T>(log, log_sums[o]) * upstream[o];
          }
        }
      }
      __syncthreads();
      weights[threadIdx.x] = w;
      __syncthreads();
      const int count = int(min(n - k0, int64_t(kBlockThreads)));
      const T *mu = from.mu + k0 * size + d, *root = from.root + k0 * size + d;
      if (share.part < share.parts)
#pragma unroll kInFlight
        for (int i = share.part; i < count; i += share.parts) {
          const T m = mu[i * size], r = root[i * size];
#pragma unroll
          for (int o = 0; o < kOwn; ++o)
            gradient[o] = add_gradient_of_z(gradient[o], weights[i].x[o], z[o], m, r * r);
        }
    }
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      gradient[o] = sum_of_parts(gradient[o], share.width, share.parts);
      if (int(threadIdx.x) < share.width && o < own)
        static_cast<T*>(p.grad_z)[(b0 + o) * size + d] = gradient[o];
    }
  }
}

// The gradients of components.
template <class T, bool kEach, int kOwn>
__device__ void gradients_of_components(const Pairs& p, int64_t k0,
                                        Numbers<T, kOwn> (&weights)[kBlockThreads]) {
  const Sides<T> from(p);
  const int64_t size = p.size, n = p.components;
  const int own = int(min(n - k0, int64_t(kOwn)));
  const T* grad = static_cast<const T*>(p.grad);
  for (int64_t first = 0; first < size; first += kBlockThreads) {
    const Share share(first, size);
    const int64_t d = share.dimension();
    T mu[kOwn];
#pragma unroll
    for (int o = 0; o < kOwn; ++o) mu[o] = from.mu[(k0 + min(o, own - 1)) * size + d];
    double own_weights[kOwn] = {}, total[kOwn][2] = {};
    for (int64_t b0 = 0; b0 < p.rows; b0 += kBlockThreads) {
      const int64_t b = b0 + threadIdx.x;
      Numbers<T, kOwn> w = {};
      if (b < p.rows) {
        if constexpr (kEach) {
#pragma unroll
          for (int o = 0; o < kOwn; ++o)
            if (o < own) w.x[o] = grad[b * n + k0 + o];
        } else {
          const auto squares = squares_of_components<T, kOwn>(from, size, k0, b);
          const double log_sum = p.log_sums[b];
          const T upstream = grad[b];
#pragma unroll
          for (int o = 0; o < kOwn; ++o) {
            if (o >= own) continue;
            const double log = log_of_pair(p, b, k0 + o, squares.total[o].value());
            w.x[o] = narrow_share_of_all<T>(log, log_sum) * upstream;
          }
        }
      }
#pragma unroll
      for (int o = 0; o < kOwn; ++o) own_weights[o] += w.x[o];
      __syncthreads();
      weights[threadIdx.x] = w;
      __syncthreads();
      const int count = int(min(p.rows - b0, int64_t(kBlockThreads)));
      ComponentSums<T> sums[kOwn] = {};
      const T* z_of_rows = from.z + b0 * size + d;
      if (share.part < share.parts)
#pragma unroll kInFlight
        for (int i = share.part; i < count; i += share.parts) {
          const T z = z_of_rows[i * size];
#pragma unroll
          for (int o = 0; o < kOwn; ++o) sums[o].add(weights[i].x[o], z, mu[o]);
        }
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        total[o][0] += sums[o].first;
        total[o][1] += sums[o].second;
      }
    }
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const double all_weights = group_sum(own_weights[o], kBlockThreads);
      for (double& sum : total[o]) sum = sum_of_parts(sum, share.width, share.parts);
      if (o >= own) continue;
      const int64_t k = k0 + o, place = k * size + d;
      if (threadIdx.x == 0 && first == 0 && p.grad_log_weights)
        static_cast<T*>(p.grad_log_weights)[k] = T(all_weights);
      if (int(threadIdx.x) >= share.width) continue;
      const double root = from.root[place], s = static_cast<const T*>(p.s)[place];
      if (p.grad_mu) static_cast<T*>(p.grad_mu)[place] = T(gradient_of_mu(total[o][0], root));
      if (p.grad_s)
        static_cast<T*>(p.grad_s)[place] =
            T(gradient_of_s(scale_of(p), s, total[o][1], all_weights, root));
    }
  }
}

// Blocks of rows and of components; first those that take longer, since what comes last should be
// short.
template <class T, bool kEach, int kOwn>
__global__ void __launch_bounds__(kBlockThreads, 2)
    pair_gradients(const __grid_constant__ Pairs p, int64_t of_rows, int64_t of_components) {
  __shared__ Numbers<T, kOwn> weights[kBlockThreads];
  const bool rows_first = p.components > p.rows;
  const int64_t first = rows_first ? of_rows : of_components;
  const bool in_first = blockIdx.x < first;
  const int64_t block = blockIdx.x - (in_first ? 0 : first);
  if (in_first == rows_first)
    gradients_of_rows<T, kEach, kOwn>(p, block * kOwn, weights);
  else
    gradients_of_components<T, kEach, kOwn>(p, block * kOwn, weights);
}

}  // namespace fastvae
