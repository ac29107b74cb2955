// The CPU loop over pairs of a row and a component (../pairs.h), but for marginals (marginals.h):
// sixteen components at a time, for eight rows at a time, or four where a vector takes two
// registers.
//
// The components are packed once, into panels of sixteen, so that a panel's dimension d is two
// whole vectors, mu and 1 / sigma. `rows` streams over the panels for a few rows, keeps a number
// for each component, and ends with a log-sum-exp or, backward, with the rows' gradients.
// `components` streams over the rows for one panel. Backward, the rows' weights are handed from one
// to the other for kPhase rows at a time.
//
// A density is summed in T for kBlock dimensions and with twice its digits beyond, since an error
// of its logarithm is one of its weight, relative to that.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "../formulas/pairs.h"
#include "../pairs.h"
#include "memory.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// Memory for vectors: not across two lines of the cache (new[] would align by 16 bytes).
struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(kRegisterBytes)); }
};
template <class E>
std::unique_ptr<E[], Free> scratch(int64_t n) {
  void* const p = ::operator new(size_t(n) * sizeof(E), std::align_val_t(kRegisterBytes));
  return std::unique_ptr<E[], Free>(static_cast<E*>(p));
}

inline int64_t panels_of(const Pairs& pairs) { return (pairs.components + kLanes - 1) / kLanes; }

// The scale of one component's dimension, of pairs.
inline Scale scale_of(const Pairs& pairs) {
  Settings settings;
  settings.scale = pairs.scale;
  return settings;
}

// A sum of squares and what its roundings left out, which is exact where the sum so far is not
// below what is added (Dekker, Numer. Math. 18, 1971). To convert each number to double takes twice
// as many instructions.
template <class V>
struct CarefulSum {
  V sum{0}, left_out{0};

  FASTVAE_INLINE void add(V square) {
    const V more = sum + square;
    left_out = left_out + (square - (more - sum));
    sum = more;
  }
  FASTVAE_INLINE V missing() const {
    return select(sum == V(Constants<Real<V>>::infinity), V(0), left_out);
  }
};

// With `kEach`, pairs stand alone; else they are a mixture.
template <class T, bool kEach>
class PairLoop {
  using V = Vec<T>;
  using Wide = Vec<double>;
  static constexpr V* kNarrow = nullptr;  // what to convert to
  static constexpr Wide* kWide = nullptr;
  static constexpr int kTile = V::kCount == 1 ? 8 : 4;  // rows that share the loads of a panel
  static constexpr int kRows = 8;                       // of a unit
  static constexpr int kBlock = 8;                      // dimensions
  static constexpr int kChunk = 64;                     // rows that are summed in T

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
      double constant[kLanes];
      Wide sum(pairs.log_other);
      Columns mu{}, s{};
      T* to = loop.panel(k);
      for (int64_t d = 0; d < pairs.size; d += kLanes) {
        const int64_t m = std::min<int64_t>(kLanes, pairs.size - d);
        const int64_t place = first * pairs.size + d;
        read_columns(static_cast<const T*>(pairs.mu) + place, pairs.size, n, m, mu);
        read_columns(static_cast<const T*>(pairs.s) + place, pairs.size, n, m, s);
        for (int64_t j = 0; j < m; ++j, to += 2 * kLanes) {
          const V vs = load_same(s[j]);
          store_same(to, load_same(mu[j]));
          store_same(to + kLanes, precision_root(scale, vs));
          sum = sum + convert(log_constant(scale, vs), kWide);
        }
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
        else if (backward)
          loop.shares(first + r, of_row, weights);
        else
          loop.log_sum(first + r, of_row);
      }
      for (int64_t r = 0; r < n && backward && pairs.grad_z; r += kTile)
        for (int64_t d = 0; d < pairs.size; ++d)
          loop.gradient_of_z(first + r, int(std::min<int64_t>(kTile, n - r)), d);
    }
  }

  // Panels [begin, end): what the present rows add to the components' sums, and after the last the
  // gradients.
  static void components(const Pairs& pairs, int64_t begin, int64_t end) {
    const PairLoop loop(pairs);
    const int64_t numbers = totals(pairs);
    const auto chunk = scratch<T>(numbers);
    const auto own = scratch<double>(pairs.totals ? 0 : numbers);
    for (int64_t k = begin; k < end; ++k) {
      double* total = pairs.totals ? pairs.totals + k * numbers : own.get();
      if (pairs.first_row == 0) std::fill_n(total, numbers, 0.0);
      for (int64_t b = pairs.first_row; b < pairs.last_row; b += kChunk) {
        std::fill_n(chunk.get(), numbers, T(0));
        const int64_t last = std::min<int64_t>(b + kChunk, pairs.last_row);
        for (int64_t row = b; row < last; row += kTile)
          loop.add_tile(k, row, int(std::min<int64_t>(kTile, last - row)), chunk.get());
        for (int64_t i = 0; i < numbers; i += kLanes)
          store_same(total + i, load_same(total + i) + load(chunk.get() + i, kWide));
      }
      if (pairs.last_row == pairs.rows) loop.write_gradients(k, total);
    }
  }

 private:
  explicit PairLoop(const Pairs& pairs) : p_(pairs) {}

  // Sixteen components by their dimensions, a vector each. Rows of `n` components and `m`
  // dimensions to that and back: one number after the other, but never a vector just after its
  // numbers, which would wait until they have left the store buffer.
  using Columns = T[kLanes][kLanes];
  static void read_columns(const T* from, int64_t stride, int64_t n, int64_t m, Columns& to) {
    for (int64_t l = 0; l < n; ++l, from += stride)
      for (int64_t j = 0; j < m; ++j) to[j][l] = from[j];
  }
  static void write_columns(const Columns& from, int64_t n, int64_t m, T* to, int64_t stride) {
    for (int64_t l = 0; l < n; ++l, to += stride)
      for (int64_t j = 0; j < m; ++j) to[j] = from[j][l];
  }

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
    CarefulSum<V> squares[kTile];
    FASTVAE_UNROLL
    for (int i = 0; i < kTile; ++i) of[i] = z(row + i);
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
      for (int i = 0; i < kTile; ++i) squares[i].add(sum[i]);
    }
    const Wide constant = load_same(p_.constants + k * kLanes);
    FASTVAE_UNROLL
    for (int i = 0; i < kTile; ++i)
      to[i] = log_density(convert(squares[i].sum, kWide) + convert(squares[i].missing(), kWide),
                          constant);
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

  // A row's gradients by the logarithms, of which `log_sums` has that of all.
  void shares(int64_t row, const double* logs, T* weights) const {
    const int64_t width = panels_of(p_) * kLanes;
    const Wide all(p_.log_sums[row]);
    const V grad(static_cast<const T*>(p_.grad)[row]);
    for (int64_t k = 0; k < width; k += kLanes) {
      const V q = convert(halvings(load_same(logs + k), all), kNarrow);
      store_same(weights + k, weight_of_all(q) * grad);
    }
  }

  // The logarithm of a row's sum.
  void log_sum(int64_t row, const double* logs) const {
    const int64_t width = panels_of(p_) * kLanes;
    Wide most(-Constants<double>::infinity);
    for (int64_t k = 0; k < width; k += kLanes) most = at_least(most, load_same(logs + k));
    double lanes[kLanes];
    store_same(lanes, most);
    const double largest = *std::max_element(lanes, lanes + kLanes);
    const Wide shift(shift_of(largest));
    V sum(0);
    for (int64_t k = 0; k < width; k += kLanes)
      sum = sum + weight(convert(halvings(load_same(logs + k), shift), kNarrow));
    const double total = sum_lanes(sum), result = log_of_sum(largest, total);
    static_cast<T*>(p_.value)[row] = T(result);
    p_.log_sums[row] = kept_log_sum(result, total);
  }

  // Of `n` rows by dimension d, from the weights that each gives to every component.
  FASTVAE_INLINE void gradient_of_z(int64_t row, int n, int64_t d) const {
    V z_of[kTile], sum[kTile];
    const T* of[kTile];
    FASTVAE_UNROLL
    for (int i = 0; i < kTile; ++i) {
      z_of[i] = V(z(row + i)[d]), sum[i] = V(0);
      of[i] = weights(row + std::min(i, n - 1));
    }
    const T* at = panel(0) + d * 2 * kLanes;
    const int64_t panels = panels_of(p_);
    for (int64_t k = 0; k < panels; ++k, at += p_.size * 2 * kLanes) {
      const V mu = load_same(at), inverse_sigma = load_same(at + kLanes);
      const V precision = inverse_sigma * inverse_sigma;
      FASTVAE_UNROLL
      for (int i = 0; i < kTile; ++i)
        sum[i] = add_gradient_of_z(sum[i], load_same(of[i] + k * kLanes), z_of[i], mu, precision);
    }
    for (int i = 0; i < n; ++i)
      static_cast<T*>(p_.grad_z)[(row + i) * p_.size + d] = sum_lanes(sum[i]);
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
    const int64_t first = k * kLanes, n = lanes(k);
    const Wide weights = load_same(sums + 2 * p_.size * kLanes);
    if (p_.grad_log_weights)
      for (int64_t l = 0; l < n; ++l)
        static_cast<T*>(p_.grad_log_weights)[first + l] = T(sums[2 * p_.size * kLanes + l]);
    if (!p_.grad_mu && !p_.grad_s) return;
    Columns s{}, of_mu, of_s;
    const T* at = panel(k);
    for (int64_t d = 0; d < p_.size; d += kLanes) {
      const int64_t m = std::min<int64_t>(kLanes, p_.size - d), place = first * p_.size + d;
      read_columns(static_cast<const T*>(p_.s) + place, p_.size, n, m, s);
      for (int64_t j = 0; j < m; ++j, at += 2 * kLanes, sums += 2 * kLanes) {
        const Wide inverse_sigma = load(at + kLanes, kWide);
        const Wide of_sigma = gradient_of_s(scale, load(s[j], kWide), load_same(sums + kLanes),
                                            weights, inverse_sigma);
        store_same(of_mu[j], convert(gradient_of_mu(load_same(sums), inverse_sigma), kNarrow));
        store_same(of_s[j], convert(of_sigma, kNarrow));
      }
      if (p_.grad_mu) write_columns(of_mu, n, m, static_cast<T*>(p_.grad_mu) + place, p_.size);
      if (p_.grad_s) write_columns(of_s, n, m, static_cast<T*>(p_.grad_s) + place, p_.size);
    }
  }

  const Pairs& p_;
};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
