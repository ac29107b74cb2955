// The CPU loop over pairs of a row and a component (../pairs.h) for the marginals of a mixture,
// every dimension by itself: an exponential for each pair and dimension, which is all of the time.
//
// No weight is above 1 (../formulas/marginals.h), so one pass over the components does without
// looking for the largest. Where that leaves next to nothing, all components being far, the row is
// done again, in double.
//
// A thread has a dimension for itself, and sums up over rows and over components at once.
#pragma once

#include "../formulas/marginals.h"
#include "kernels.h"
#include "pairs.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

template <class T>
class MarginalLoop {
  using V = Vec<T>;
  using Wide = Vec<double>;
  static constexpr int kTile = 4;     // rows that share the loads of a panel
  static constexpr int kRows = 64;    // of a unit, and so many are summed in T
  static constexpr int kNumbers = 3;  // of a component in a panel, and as many sums

 public:
  static int64_t packed_size(const Pairs& pairs) {
    return pairs.size * panels_of(pairs) * kNumbers * kLanes;
  }
  static int64_t totals(const Pairs&) { return 0; }
  static int64_t pack_units(const Pairs& pairs) { return pairs.size; }
  static int64_t row_units(const Pairs& pairs) { return pairs.size * blocks(pairs); }
  static int64_t component_units(const Pairs& pairs) { return pairs.size; }

  // Dimensions [begin, end). `constants` has log2 of the highest density.
  static void pack(const Pairs& pairs, int64_t begin, int64_t end) {
    const Scale scale = scale_of(pairs);
    const auto* weights = static_cast<const T*>(pairs.log_weights);
    const int64_t n = pairs.components, width = panels_of(pairs) * kLanes;
    const auto log2 = scratch<double>(width);
    for (int64_t d = begin; d < end; ++d) {
      const MarginalLoop loop(pairs, d);
      double highest = -Constants<double>::infinity;
      for (int64_t k = 0; k < width; ++k) {
        const T s = k < n ? static_cast<const T*>(pairs.s)[k * pairs.size + d] : T(0);
        T* to = loop.panel(k / kLanes) + k % kLanes;
        to[0] = k < n ? static_cast<const T*>(pairs.mu)[k * pairs.size + d] : T(0);
        to[kLanes] = marginal_root(scale, s);
        const double weight = pairs.log_other + (weights && k < n ? double(weights[k]) : 0);
        log2[k] = k < n ? highest_log2(scale, s, weight) : -Constants<double>::infinity;
        highest = log2[k] > highest ? log2[k] : highest;
      }
      highest = shift_of(highest);
      pairs.constants[d] = highest;
      for (int64_t k = 0; k < width; ++k)
        loop.panel(k / kLanes)[2 * kLanes + k % kLanes] = T(highest - log2[k]);
    }
  }

  // Units [begin, end), a dimension of some rows each: the logarithms of their sums, which `value`
  // is to be the sum of, over dimensions.
  static void rows(const Pairs& pairs, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const MarginalLoop loop(pairs, unit / blocks(pairs));
      const int64_t first = unit % blocks(pairs) * kRows;
      const int64_t last = std::min<int64_t>(first + kRows, pairs.rows);
      for (int64_t row = first; row < last; row += kTile) {
        T sums[kTile];
        loop.template weigh<false>(row, nullptr, sums);
        for (int64_t i = 0; i < std::min<int64_t>(kTile, last - row); ++i)
          pairs.log_sums[loop.d_ * pairs.rows + row + i] =
              sums[i] >= T(kFarSum) ? loop.log_sum(sums[i])
                                    : loop.weigh_far(row + i, nullptr).log_sum;
      }
    }
  }

  // Dimensions [begin, end): all gradients. That of a weight is in `of_weights`, for each
  // dimension.
  static void components(const Pairs& pairs, int64_t begin, int64_t end) {
    const int64_t width = panels_of(pairs) * kLanes;
    const auto weights = scratch<T>(kTile * width), chunk = scratch<T>(kNumbers * width);
    const auto total = scratch<double>(kNumbers * width);
    for (int64_t d = begin; d < end; ++d) {
      const MarginalLoop loop(pairs, d);
      std::fill_n(total.get(), kNumbers * width, 0.0);
      for (int64_t b = 0; b < pairs.rows; b += kRows) {
        std::fill_n(chunk.get(), kNumbers * width, T(0));
        const int64_t last = std::min<int64_t>(b + kRows, pairs.rows);
        for (int64_t row = b; row < last; row += kTile)
          loop.add_tile(row, int(std::min<int64_t>(kTile, last - row)), weights.get(), chunk.get());
        for (int64_t i = 0; i < kNumbers * width; i += kLanes)
          store_same(total.get() + i, load_same(total.get() + i) +
                                          load(chunk.get() + i, static_cast<Wide*>(nullptr)));
      }
      loop.write_gradients(total.get());
    }
  }

 private:
  MarginalLoop(const Pairs& pairs, int64_t d) : p_(pairs), d_(d) {
    // What the pair of a row with the component of its own number weighs more, at its place.
    for (T& factor : own_) factor = T(1);
    own_[kLanes - 1] = own_factor<T>(pairs.log_own, pairs.log_other);
  }

  static int64_t blocks(const Pairs& pairs) { return (pairs.rows + kRows - 1) / kRows; }
  // Of sixteen components: mu, the factor of t, the cost.
  T* panel(int64_t k) const {
    return static_cast<T*>(p_.packed) + (d_ * panels_of(p_) + k) * kNumbers * kLanes;
  }
  T z(int64_t row) const {
    return static_cast<const T*>(p_.z)[std::min(row, p_.rows - 1) * p_.size + d_];
  }
  double log_sum(double sum) const { return log_of_marginal(p_.constants[d_], sum); }
  bool has_own() const { return p_.log_own != p_.log_other; }
  V own(int64_t row, int64_t k) const {
    const int64_t lane = row - k * kLanes;
    return lane < 0 || lane >= kLanes ? V(1) : load_same(own_ + kLanes - 1 - lane);
  }

  // The weights of some rows, and their sums.
  template <bool kKeep>
  FASTVAE_INLINE void weigh(int64_t row, T* weights, T (&sums)[kTile]) const {
    const int64_t panels = panels_of(p_), width = panels * kLanes;
    V of[kTile], sum[kTile];
    FASTVAE_UNROLL
    for (int i = 0; i < kTile; ++i) of[i] = V(z(row + i)), sum[i] = V(0);
    const T* at = panel(0);
    for (int64_t k = 0; k < panels; ++k, at += kNumbers * kLanes) {
      const V mu = load_same(at), factor = load_same(at + kLanes),
              cost = load_same(at + 2 * kLanes);
      const bool owns = has_own() && row / kLanes == k;  // a tile never spans two panels
      FASTVAE_UNROLL
      for (int i = 0; i < kTile; ++i) {
        V w = marginal_weight(cost, of[i], mu, factor);
        if (owns) w = w * own(row + i, k);
        if (kKeep) store_same(weights + i * width + k * kLanes, w);
        sum[i] = sum[i] + w;
      }
    }
    FASTVAE_UNROLL
    for (int i = 0; i < kTile; ++i) sums[i] = sum_lanes(sum[i]);
  }

  // The same for one row, in double and against the largest weight.
  struct Far {
    T sum;
    double log_sum;
  };
  [[gnu::noinline]] Far weigh_far(int64_t row, T* weights) const {
    const Scale scale = scale_of(p_);
    const int64_t n = p_.components;
    const auto logs = scratch<double>(n);
    const auto* log_weights = static_cast<const T*>(p_.log_weights);
    double largest = -Constants<double>::infinity, sum = 0;
    for (int64_t k = 0; k < n; ++k) {
      const double mu = static_cast<const T*>(p_.mu)[k * p_.size + d_];
      const double s = static_cast<const T*>(p_.s)[k * p_.size + d_];
      logs[k] = far_log_density(scale, z(row), mu, s) + (log_weights ? log_weights[k] : 0) +
                (k == row ? p_.log_own : p_.log_other);
      largest = logs[k] > largest ? logs[k] : largest;
    }
    const double shift = shift_of(largest);
    for (int64_t k = 0; k < n; ++k) {
      const double w = share(logs[k], shift);
      if (weights) weights[k] = T(w);
      sum += w;
    }
    return {T(sum), log_of_sum(largest, sum)};
  }

  // Adds what `n` rows contribute: to the components the sums of w, w u, w u^2.
  FASTVAE_INLINE void add_tile(int64_t row, int n, T* weights, T* sums) const {
    const int64_t panels = panels_of(p_), width = panels * kLanes;
    T of_row[kTile];
    weigh<true>(row, weights, of_row);
    V of[kTile], factor[kTile], gradient[kTile];
    for (int i = 0; i < kTile; ++i) {
      const T grad = i < n ? static_cast<const T*>(p_.grad)[row + i] : T(0);
      if (i < n && !(of_row[i] >= T(kFarSum)))
        of_row[i] = weigh_far(row + i, weights + i * width).sum;
      of[i] = V(z(row + i));
      factor[i] = V(i < n && of_row[i] != 0 ? grad / of_row[i] : T(0));
      gradient[i] = V(0);
    }
    const T* at = panel(0);
    for (int64_t k = 0; k < panels; ++k, at += kNumbers * kLanes, sums += kNumbers * kLanes) {
      const V mu = load_same(at), root = load_same(at + kLanes), precision = root * root;
      V all = load_same(sums);
      ComponentSums<V> sum{load_same(sums + kLanes), load_same(sums + 2 * kLanes)};
      FASTVAE_UNROLL
      for (int i = 0; i < kTile; ++i) {
        const V w = load_same(weights + i * width + k * kLanes) * factor[i];
        all = all + w;
        sum.add(w, of[i], mu);
        gradient[i] = add_gradient_of_z(gradient[i], w, of[i], mu, precision);
      }
      store_same(sums, all);
      store_same(sums + kLanes, sum.first);
      store_same(sums + 2 * kLanes, sum.second);
    }
    if (!p_.grad_z) return;
    for (int i = 0; i < n; ++i)
      static_cast<T*>(p_.grad_z)[(row + i) * p_.size + d_] =
          sum_lanes(gradient[i]) * T(kMarginalPrecision);
  }

  void write_gradients(const double* sums) const {
    const Scale scale = scale_of(p_);
    for (int64_t k = 0; k < p_.components; ++k) {
      const int64_t place = k * p_.size + d_;
      const double* of = sums + k / kLanes * kNumbers * kLanes + k % kLanes;
      const double root = panel(k / kLanes)[kLanes + k % kLanes] / kMarginalRoot;
      if (p_.grad_mu) static_cast<T*>(p_.grad_mu)[place] = T(gradient_of_mu(of[kLanes], root));
      if (p_.grad_s) {
        const double s = static_cast<const T*>(p_.s)[place];
        static_cast<T*>(p_.grad_s)[place] = T(gradient_of_s(scale, s, of[2 * kLanes], of[0], root));
      }
      if (p_.grad_log_weights) p_.of_weights[d_ * p_.components + k] = of[0];
    }
  }

  const Pairs& p_;
  const int64_t d_;
  alignas(64) T own_[2 * kLanes - 1];
};

template <class Loop>
constexpr PairKernels kPairKernels = {Loop::packed_size,
                                      Loop::totals,
                                      {Loop::pack_units, Loop::pack},
                                      {Loop::row_units, Loop::rows},
                                      {Loop::component_units, Loop::components}};
constexpr PairKernels kPairRows[kPairValues][2] = {
    {kPairKernels<PairLoop<float, true>>, kPairKernels<PairLoop<double, true>>},
    {kPairKernels<PairLoop<float, false>>, kPairKernels<PairLoop<double, false>>},
    {kPairKernels<MarginalLoop<float>>, kPairKernels<MarginalLoop<double>>}};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
