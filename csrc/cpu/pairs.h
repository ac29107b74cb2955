// The CPU loop over pairs of a row and a component (../pairs.h), but for marginals (marginals.h):
// sixteen components at a time, for four rows at a time.
//
// The components are packed once, into panels of sixteen, so that a panel's dimension d is two
// whole vectors, mu and 1 / sigma. `rows` streams over the panels for a few rows, keeps a number
// for each component, and ends with a log-sum-exp or, backward, with the rows' gradients.
// `components` streams over the rows for one panel. Backward, the rows' weights are handed from one
// to the other for kPhase rows at a time.
//
// A density is summed in T for kBlock dimensions and in double beyond, since an error of its
// logarithm is one of its weight, relative to that.
#pragma once

#include <algorithm>
#include <memory>

#include "../formulas/pairs.h"
#include "../pairs.h"
#include "memory.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

template <class E>
std::unique_ptr<E[]> scratch(int64_t n) {
  return std::unique_ptr<E[]>(new E[size_t(n)]);
}

inline int64_t panels_of(const Pairs& pairs) { return (pairs.components + kLanes - 1) / kLanes; }

// The scale of one component's dimension, of pairs.
inline Scale scale_of(const Pairs& pairs) {
  Settings settings;
  settings.scale = pairs.scale;
  return settings;
}

// With `kEach`, pairs stand alone; else they are a mixture.
template <class T, bool kEach>
class PairLoop {
  using V = Vec<T>;
  using Wide = Vec<double>;
  static constexpr int kTile = 4;    // rows that share the loads of a panel
  static constexpr int kRows = 8;    // of a unit
  static constexpr int kBlock = 8;   // dimensions
  static constexpr int kChunk = 64;  // rows that are summed in T

 public:
  static int64_t packed_size(const Pairs& pairs) {
    return panels_of(pairs) * pairs.size * 2 * kLanes;
  }
  // Of a panel: of each dimension two numbers for sixteen components, and their weights.
  static int64_t totals(const Pairs& pairs) { return (2 * pairs.size + 1) * kLanes; }
  static int64_t pack_units(const Pairs& pairs) { return panels_of(pairs); }
  static int64_t row_units(const Pairs& pairs) {
    return (pairs.last_row - pairs.first_row + kRows - 1) / kRows;
  }
  static int64_t component_units(const Pairs& pairs) { return panels_of(pairs); }

  // Panels [begin, end).
  static void pack(const Pairs& pairs, int64_t begin, int64_t end) {
    const PairLoop loop(pairs);
    const Scale scale = scale_of(pairs);
    const auto* weights = static_cast<const T*>(pairs.log_weights);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * kLanes, n = loop.lanes(k);
      T mu[kLanes] = {}, s[kLanes] = {};
      double constant[kLanes];
      Wide sum(pairs.log_other);
      T* to = loop.panel(k);
      for (int64_t d = 0; d < pairs.size; ++d, to += 2 * kLanes) {
        for (int64_t l = 0; l < n; ++l) {
          mu[l] = static_cast<const T*>(pairs.mu)[(first + l) * pairs.size + d];
          s[l] = static_cast<const T*>(pairs.s)[(first + l) * pairs.size + d];
        }
        const V vs = load_same(s);
        store_same(to, load_same(mu));
        store_same(to + kLanes, precision_root(scale, vs));
        sum = sum + convert(log_constant(scale, vs), static_cast<Wide*>(nullptr));
      }
      store_same(constant, sum);
      for (int64_t l = 0; l < kLanes; ++l)
        pairs.constants[first + l] = l >= n ? -Constants<double>::infinity
                                            : constant[l] + (weights ? weights[first + l] : 0);
    }
  }

  // Units [begin, end) of the present rows: their values, or what they give to each component and,
  // from that, the gradients of z.
  static void rows(const Pairs& pairs, int64_t begin, int64_t end) {
    const PairLoop loop(pairs);
    const bool backward = pairs.grad;
    const int64_t panels = panels_of(pairs), width = panels * kLanes;
    const bool densities = !(kEach && backward);
    const auto logs = scratch<double>(densities ? kRows * width : 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = pairs.first_row + unit * kRows;
      const int64_t n = std::min<int64_t>(kRows, pairs.last_row - first);
      for (int64_t k = 0; densities && k < panels; ++k)
        for (int64_t r = 0; r < n; r += kTile) {
          Wide of_tile[kTile];
          loop.log_densities(k, first + r, of_tile);
          for (int i = 0; i < kTile; ++i)
            store_same(logs.get() + (r + i) * width + k * kLanes, of_tile[i]);
        }
      for (int64_t r = 0; r < n; ++r) {
        const double* of_row = logs.get() + r * width;
        T* weights = backward ? loop.weights(first + r) : nullptr;
        if constexpr (kEach)
          loop.each(first + r, of_row, weights);
        else
          loop.log_sum(first + r, of_row, weights);
      }
      if (backward && pairs.grad_z) loop.gradient_of_z(first, n);
    }
  }

  // Panels [begin, end): what the present rows add to the components' sums, and after the last the
  // gradients.
  static void components(const Pairs& pairs, int64_t begin, int64_t end) {
    const PairLoop loop(pairs);
    const int64_t numbers = totals(pairs);
    const auto chunk = scratch<T>(numbers);
    for (int64_t k = begin; k < end; ++k) {
      double* total = pairs.totals + k * numbers;
      if (pairs.first_row == 0) std::fill_n(total, numbers, 0.0);
      for (int64_t b = pairs.first_row; b < pairs.last_row; b += kChunk) {
        std::fill_n(chunk.get(), numbers, T(0));
        const int64_t last = std::min<int64_t>(b + kChunk, pairs.last_row);
        for (int64_t row = b; row < last; row += kTile)
          loop.add_tile(k, row, int(std::min<int64_t>(kTile, last - row)), chunk.get());
        for (int64_t i = 0; i < numbers; i += kLanes)
          store_same(total + i,
                     load_same(total + i) + load(chunk.get() + i, static_cast<Wide*>(nullptr)));
      }
      if (pairs.last_row == pairs.rows) loop.write_gradients(k, total);
    }
  }

 private:
  explicit PairLoop(const Pairs& pairs) : p_(pairs) {}

  // What a present row gives to each component.
  T* weights(int64_t row) const {
    return static_cast<T*>(p_.weights) + (row - p_.first_row) * panels_of(p_) * kLanes;
  }
  T* panel(int64_t k) const { return static_cast<T*>(p_.packed) + k * p_.size * 2 * kLanes; }
  // Components of a panel.
  int64_t lanes(int64_t k) const { return std::min<int64_t>(kLanes, p_.components - k * kLanes); }
  // A row; beyond the last, the last.
  const T* z(int64_t row) const {
    return static_cast<const T*>(p_.z) + std::min(row, p_.rows - 1) * p_.size;
  }

  FASTVAE_INLINE void log_densities(int64_t k, int64_t row, Wide (&to)[kTile]) const {
    const T* at = panel(k);
    const T* of[kTile];
    FASTVAE_UNROLL
    for (int i = 0; i < kTile; ++i) of[i] = z(row + i), to[i] = Wide(0);
    for (int64_t d = 0; d < p_.size; d += kBlock) {
      V sum[kTile];
      FASTVAE_UNROLL
      for (int i = 0; i < kTile; ++i) sum[i] = V(0);
      const int64_t last = std::min(d + kBlock, p_.size);
      for (int64_t j = d; j < last; ++j, at += 2 * kLanes) {
        const V mu = load_same(at), inverse_sigma = load_same(at + kLanes);
        FASTVAE_UNROLL
        for (int i = 0; i < kTile; ++i) sum[i] = add_square(sum[i], V(of[i][j]), mu, inverse_sigma);
      }
      FASTVAE_UNROLL
      for (int i = 0; i < kTile; ++i) to[i] = to[i] + convert(sum[i], static_cast<Wide*>(nullptr));
    }
    const Wide constant = load_same(p_.constants + k * kLanes);
    FASTVAE_UNROLL
    for (int i = 0; i < kTile; ++i) to[i] = log_density(to[i], constant);
    if (p_.log_own == p_.log_other) return;
    for (int i = 0; i < kTile; ++i) {
      const int64_t own = row + i - k * kLanes;
      if (own < 0 || own >= kLanes) continue;
      double logs[kLanes];
      store_same(logs, to[i]);
      logs[own] += p_.log_own - p_.log_other;
      to[i] = load_same(logs);
    }
  }

  // Of pairs alone: the values of a row, or its upstream gradients.
  void each(int64_t row, const double* logs, T* weights) const {
    const int64_t n = p_.components;
    if (weights) {
      std::copy_n(static_cast<const T*>(p_.grad) + row * n, n, weights);
      std::fill(weights + n, weights + panels_of(p_) * kLanes, T(0));
      return;
    }
    T* value = static_cast<T*>(p_.value) + row * n;
    for (int64_t k = 0; k < n; ++k) value[k] = T(logs[k]);
  }

  // The logarithm of a row's sum; or with `weights` the gradient by each of the logarithms.
  void log_sum(int64_t row, const double* logs, T* weights) const {
    const int64_t width = panels_of(p_) * kLanes;
    Wide most(-Constants<double>::infinity);
    for (int64_t k = 0; k < width; k += kLanes) most = at_least(most, load_same(logs + k));
    double lanes[kLanes];
    store_same(lanes, most);
    const double largest = *std::max_element(lanes, lanes + kLanes);
    const Wide shift(shift_of(largest));
    V sum(0);
    for (int64_t k = 0; k < width; k += kLanes) {
      const V w = weight(convert(halvings(load_same(logs + k), shift), static_cast<V*>(nullptr)));
      if (weights) store_same(weights + k, w);
      sum = sum + w;
    }
    const T total = sum_lanes(sum);
    const double result = log_of_sum(largest, double(total));
    if (!weights) {
      static_cast<T*>(p_.value)[row] = T(result);
      return;
    }
    const V factor(total == 0 ? 0 : static_cast<const T*>(p_.grad)[row] / total);
    for (int64_t k = 0; k < width; k += kLanes)
      store_same(weights + k, load_same(weights + k) * factor);
  }

  // Of `n` rows, from the weights that each gives to every component; kBlock dimensions at a time,
  // whose sums stay in the first-level cache.
  void gradient_of_z(int64_t first, int64_t n) const {
    alignas(64) T sums[kRows * kBlock * kLanes];
    const int64_t panels = panels_of(p_);
    for (int64_t d = 0; d < p_.size; d += kBlock) {
      const int m = int(std::min<int64_t>(kBlock, p_.size - d));
      std::fill_n(sums, kRows * m * kLanes, T(0));
      for (int64_t k = 0; k < panels; ++k)
        for (int64_t r = 0; r < n; r += kTile) {
          const T* at = panel(k) + d * 2 * kLanes;
          const T* of[kTile];
          V weight[kTile];
          FASTVAE_UNROLL
          for (int i = 0; i < kTile; ++i) {
            of[i] = z(first + r + i) + d;
            weight[i] = r + i < n ? load_same(weights(first + r + i) + k * kLanes) : V(0);
          }
          T* sum = sums + r * m * kLanes;
          for (int j = 0; j < m; ++j, at += 2 * kLanes, sum += kTile * kLanes) {
            const V mu = load_same(at), inverse_sigma = load_same(at + kLanes);
            const V precision = inverse_sigma * inverse_sigma;
            FASTVAE_UNROLL
            for (int i = 0; i < kTile; ++i)
              store_same(sum + i * kLanes, add_gradient_of_z(load_same(sum + i * kLanes), weight[i],
                                                             V(of[i][j]), mu, precision));
          }
        }
      for (int64_t r = 0; r < n; ++r)
        for (int j = 0; j < m; ++j) {
          const T* sum = sums + (r / kTile * kTile * m + j * kTile + r % kTile) * kLanes;
          static_cast<T*>(p_.grad_z)[(first + r) * p_.size + d + j] = sum_lanes(load_same(sum));
        }
    }
  }

  // Adds to the sums of a panel what `n` rows contribute.
  FASTVAE_INLINE void add_tile(int64_t k, int64_t row, int n, T* sums) const {
    const T* at = panel(k);
    const T* of[kTile];
    V weight[kTile];
    T* all = sums + 2 * p_.size * kLanes;
    V all_weights = load_same(all);
    FASTVAE_UNROLL
    for (int i = 0; i < kTile; ++i) {
      of[i] = z(row + i);
      weight[i] = i < n ? load_same(weights(row + i) + k * kLanes) : V(0);
      all_weights = all_weights + weight[i];
    }
    store_same(all, all_weights);
    for (int64_t d = 0; d < p_.size; ++d, at += 2 * kLanes, sums += 2 * kLanes) {
      const V mu = load_same(at);
      ComponentSums<V> sum{load_same(sums), load_same(sums + kLanes)};
      FASTVAE_UNROLL
      for (int i = 0; i < kTile; ++i) sum.add(weight[i], V(of[i][d]), mu);
      store_same(sums, sum.first);
      store_same(sums + kLanes, sum.second);
    }
  }

  void write_gradients(int64_t k, const double* sums) const {
    const Scale scale = scale_of(p_);
    const double* weights = sums + 2 * p_.size * kLanes;
    const T* at = panel(k);
    for (int64_t l = 0; l < lanes(k) && p_.grad_log_weights; ++l)
      static_cast<T*>(p_.grad_log_weights)[k * kLanes + l] = T(weights[l]);
    for (int64_t d = 0; d < p_.size; ++d, at += 2 * kLanes, sums += 2 * kLanes)
      for (int64_t l = 0; l < lanes(k); ++l) {
        const int64_t place = (k * kLanes + l) * p_.size + d;
        const double inverse_sigma = at[kLanes + l];
        if (p_.grad_mu)
          static_cast<T*>(p_.grad_mu)[place] = T(gradient_of_mu(sums[l], inverse_sigma));
        if (p_.grad_s) {
          const double s = static_cast<const T*>(p_.s)[place];
          static_cast<T*>(p_.grad_s)[place] =
              T(gradient_of_s(scale, s, sums[kLanes + l], weights[l], inverse_sigma));
        }
      }
  }

  const Pairs& p_;
};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
