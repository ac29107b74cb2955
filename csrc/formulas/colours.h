// A pixel's colours as a mixture of discretized logistics (Salimans et al. 2017, "PixelCNN++"):
//
//     ln sum_k softmax(l)_k prod_c P(x_c; m_kc, s_kc)
//
// With three channels the mean of green depends on red, and that of blue on both, by coefficients
// a = tanh(raw):
//
//     m_1 + a_0 x_0,   m_2 + a_1 x_0 + a_2 x_1
//
// Scales are bounded from below: their gradient is 0 beyond. `At` reads a plane's number at this
// pixel, `Put` writes one of a gradient.
#pragma once

#include "../colours.h"
#include "../signature.h"
#include "log_sums.h"
#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

struct ColourMixtureLogProb {
  static constexpr Signature signature{.name = "colour_mixture_log_prob",
                                       .operands = {"x", "parameters", "pixel_weight"},
                                       .value = "log_prob",
                                       .levels = true,
                                       .loop = Loop::colours,
                                       .optional = true};
};

// The mass of x's bin, of width w between two levels, as in pixels.h, but by three exponentials and
// what channels share, a division and a logarithm: it is added to numbers of its size, so that an
// absolute error is all that counts. With d >= 0 the distance of x from m (in the outermost bins,
// outwards),
//
//     lower = (d - w/2) / b,   t = w / b,   u = e^-|lower|,   v = e^-(lower + t)
//     ln P = ln((1 - e^-t) / ((1 + u) (1 + v))) - max(0, lower)
//
// and in the outermost bins the same with v = 0 and no e^-t. As derivatives,
// d ln P / dm = +-(s(lower) - s(-upper)) / b, s being the logistic function.
template <class V>
struct LogisticMass {
  using R = Real<V>;
  decltype(V() < V()) first, last, outermost, tiny, upwards;
  V inverse, lower, t, u, v, ratio, decay, decayed, denominator, log_width_over_b;
  V share;  // 1 / denominator, of which all channels' are found at once

  LogisticMass() = default;
  FASTVAE_INLINE LogisticMass(const Levels& levels, V x, V mean, V s)
      : first(x < V(R(levels.first_end))),
        last(x > V(R(levels.last_begin))),
        outermost(first | last),
        upwards(last | (x > mean)) {
    const V width(R(2 * levels.half_width)), difference = x - mean;
    const V distance =
        select(last, difference, select(first, V(0) - difference, magnitude(difference)));
    inverse = at_most(V(R(1e30)), exp(V(0) - s).exp);
    t = width * inverse;
    lower = (distance - V(R(levels.half_width))) * inverse;
    // e^-|lower|, e^-lower, as normal numbers: where the second is more than 10^30 e^-t is 0, and
    // what is below 10^-30 is nothing beside 1.
    const ExpBothWays<V> e_lower = exp_both_ways(at_most(V(86), at_least(V(-69), lower)));
    ratio = e_lower.down;
    u = select(lower > V(0), e_lower.down, e_lower.up);
    const Exp<V> e = exp(V(0) - t);
    decayed = e.exp;
    decay = V(0) - e.expm1;
    v = select(outermost, V(0), ratio * decayed);
    denominator = (V(1) + u) * (V(1) + v);
    tiny = t < V(R(1e-30));  // of a scale so large, t itself may be lost
    log_width_over_b = V(R(levels.log_width)) - s;
  }

  // The mass is one times e^ the other.
  FASTVAE_INLINE V factor() const { return select(outermost | tiny, V(1), decay) * share; }
  FASTVAE_INLINE V exponent() const {
    const V lost = select(tiny, log_width_over_b, V(0));
    return select(outermost, V(0), lost) - at_least(V(0), lower);
  }
  FASTVAE_INLINE V by_mean() const {
    const V below = below_lower();
    // s(lower) - s(-upper) = s(lower) s(upper) (1 - e^{-2 d / b})
    const V inside = below * ((V(1) + u) * share) * (V(1) - ratio * v);
    const V pull = select(outermost, below, inside) * inverse;
    return select(first, V(0) - pull, select(upwards, pull, V(0) - pull));
  }
  FASTVAE_INLINE V by_log_scale() const {
    const V above_upper = v * (V(1) + u) * share;
    const V slope = select(tiny, V(-1), V(0) - t * decayed / decay);
    const V ends = lower * below_lower() - (lower + t) * above_upper;
    return select(outermost, ends, ends + slope);
  }

 private:
  FASTVAE_INLINE V below_lower() const {  // s(lower)
    return select(lower > V(0), V(1), u) * ((V(1) + v) * share);
  }
};

// What a component's gradients are made of.
template <class V, int kChannels>
struct ColourSlopes {
  V by_mean[kChannels], by_log_scale[kChannels];  // of the logarithm of its mass
  V coefficient[kChannels];                       // of three channels

  // `weight` is the upstream gradient of that logarithm. No weight, no gradient, even where a slope
  // has overflowed.
  template <class Put>
  FASTVAE_INLINE void gradients(const Colours& c, const V (&x)[kChannels], int k, V weight,
                                const Put& put) const {
    const auto none = weight == V(0);
    V of_mean[kChannels];
    FASTVAE_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      of_mean[i] = select(none, V(0), weight * by_mean[i]);
      put(c.mean(i, k), of_mean[i]);
      put(c.log_scale(i, k), select(none, V(0), weight * by_log_scale[i]));
    }
    if constexpr (kChannels == 3) {
      const V of_coefficient[3] = {of_mean[1] * x[0], of_mean[2] * x[0], of_mean[2] * x[1]};
      FASTVAE_UNROLL
      for (int i = 0; i < 3; ++i)
        put(c.coefficient(i, k), of_coefficient[i] * (V(1) - coefficient[i] * coefficient[i]));
    }
  }
};

template <class V, int kChannels>
struct ColourComponent {
  const Colours& c;
  V x[kChannels], mean[kChannels], log_scale[kChannels], coefficient[kChannels];

  template <class At>
  FASTVAE_INLINE ColourComponent(const Colours& colours, const V (&of_pixel)[kChannels], int k,
                                 const At& at)
      : c(colours) {
    FASTVAE_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      x[i] = of_pixel[i];
      mean[i] = at(c.mean(i, k));
      log_scale[i] = at(c.log_scale(i, k));
    }
    if constexpr (kChannels == 3) {
      V above[3], below[3];
      FASTVAE_UNROLL
      for (int i = 0; i < 3; ++i) {
        const Ratio<V> y = tanh_as_ratio(at(c.coefficient(i, k)));
        above[i] = y.above, below[i] = y.below;
      }
      reciprocals(below, coefficient);
      FASTVAE_UNROLL
      for (int i = 0; i < 3; ++i) coefficient[i] = coefficient[i] * above[i];
      mean[1] = fma(coefficient[0], x[0], mean[1]);
      mean[2] = fma(coefficient[2], x[1], fma(coefficient[1], x[0], mean[2]));
    }
  }

  FASTVAE_INLINE V log_mass() const {
    return log_mass([](int, const LogisticMass<V>&) {});
  }
  FASTVAE_INLINE V log_mass(ColourSlopes<V, kChannels>& slopes) const {
    return log_mass([&](int i, const LogisticMass<V>& mass) {
      slopes.by_mean[i] = mass.by_mean();
      const auto bounded = log_scale[i] < least_log_scale();
      slopes.by_log_scale[i] = select(bounded, V(0), mass.by_log_scale());
      if (kChannels == 3) slopes.coefficient[i] = coefficient[i];
    });
  }

 private:
  template <class F>
  FASTVAE_INLINE V log_mass(const F& f) const {
    LogisticMass<V> mass[kChannels];
    V denominator[kChannels], share[kChannels], factor[kChannels], exponent(0);
    FASTVAE_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      const V s = at_least(least_log_scale(), log_scale[i]);
      mass[i] = LogisticMass<V>(c.settings.levels, x[i], mean[i], s);
      denominator[i] = mass[i].denominator;
    }
    reciprocals(denominator, share);
    FASTVAE_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      mass[i].share = share[i];
      factor[i] = mass[i].factor();
      exponent = exponent + mass[i].exponent();
      f(i, mass[i]);
    }
    return log_of_product(factor) + exponent;
  }
  FASTVAE_INLINE V least_log_scale() const { return V(Real<V>(c.least_log_scale)); }
};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
