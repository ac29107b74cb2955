// The log-probabilities of counts, as the structs of gaussian.h.
//
// No gamma function is formed and no difference of two. Of ln Gamma(z) the leading terms,
// (z - 1/2) ln z - z, make together with the others a deviance, dev(v) = v - ln(1 + v) >= 0 of a
// relative difference v (Loader 2000, "Fast and accurate computation of binomial probabilities");
// what is left is S(z) of Stirling's series (gamma.h). For x > 0
//
//   Poisson            -1/2 ln(2 pi x) - S(x) - x dev((m - x) / x)
//   negative binomial  -1/2 ln(2 pi x y / theta) + S(y) - S(x) - S(theta)
//                      - x dev(theta (m - x) / (x (theta + m))) - theta dev((x - m) / (theta + m))
//
// with y = x + theta, all in small terms. x is data; between whole numbers the functions of gamma.h
// go on.
#pragma once

#include "../plan.h"
#include "../signature.h"
#include "gamma.h"
#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// A mean or a dispersion, given as itself or as its logarithm. That may be beyond what its
// exponential can express; `under` and `over` tell how far.
template <class V>
struct Rate {
  V value;
  V above_0;      // the same, but not 0 if only its logarithm can say so
  V under, over;  // ln of the rate is ln above_0 + under + over

  FASTVAE_INLINE Rate(const Counts& counts, V given, V log_max)
      : value(given), above_0(given), under(0), over(0) {
    if (!counts.logarithmic) return;
    const V log_min(kLogMin), top = at_most(log_max, given), bottom = at_least(log_min, top);
    over = select(given > log_max, given - log_max, V(0));
    under = top - bottom;
    value = exp(top).exp;
    above_0 = select(top < log_min, exp(log_min).exp, value);
  }

  // Whose exponential, and that divided by a count, is a normal number.
  static constexpr Real<V> kLogMin = -60;
};

// ---- Poisson ------------------------------------------------------------------------------------
// x ln m - m - ln x!

struct PoissonLogProb {
  static constexpr Signature signature{.name = "poisson_log_prob",
                                       .operands = {"x", "rate"},
                                       .value = "log_prob",
                                       .rates = {"rate", "log_rate"}};
  template <class V>
  FASTVAE_INLINE static Rate<V> rate_of(const Settings& settings, const V (&in)[2]) {
    return {settings.counts, in[1], V(Constants<Real<V>>::infinity)};
  }
  struct Forward {
    static constexpr Step step{.inputs = 2, .outputs = 0, .value = true};
    template <class V>
    FASTVAE_INLINE static V apply(Settings settings, const V (&in)[2], V, V, V (&)[1]) {
      const auto none = in[0] == V(0);
      const V x = select(none, V(1), in[0]), inverse = V(1) / x;
      const Rate<V> m = rate_of(settings, in);
      const V dev = log_deviance((m.value - x) * inverse, m.above_0 * inverse) - m.under;
      const V peak = fma(V(-0.5), log(x * V(Real<V>(kTwoPi))), V(0) - stirling(x, inverse));
      return select(none, V(0) - m.value, peak - x * dev);
    }
  };
  struct Backward {
    static constexpr Step step{.inputs = 2, .outputs = 2, .row_grad = true};
    template <class V>
    FASTVAE_INLINE static V apply(Settings settings, const V (&in)[2], V grad_log_prob, V,
                                  V (&out)[2]) {
      const V& x = in[0];
      auto& [grad_x, grad_rate] = out;
      const Rate<V> m = rate_of(settings, in);
      const V difference = x - m.value;
      const V by_rate =
          settings.counts.logarithmic ? difference : select(x == V(0), V(-1), difference / m.value);
      grad_rate = grad_log_prob * by_rate;
      grad_x = V(0);
      if (settings.counts.data_gradient) {
        const V next = x + V(1);
        grad_x = grad_log_prob * (log(m.above_0 / next) + m.under + digamma_gap(next));
      }
      return V(0);
    }
  };
};

// ---- Negative binomial --------------------------------------------------------------------------
// ln Gamma(x + theta) - ln Gamma(theta) - ln x! + theta ln(theta / (theta + m))
//                                               + x ln(m / (theta + m))

template <class V>
struct NegativeBinomial {
  bool logarithmic;
  decltype(V() < V()) none, some;  // where x = 0, and where not
  V x;                             // 1 there
  V log_unit;  // <= 0, of what m and theta are counted in, where both are given as tiny
  Rate<V> m, of_theta;
  V theta;
  V share;      // 1 / (theta + m)
  V v, ratio;   // (x - m) / (theta + m), and 1 + v
  V dev;        // of v
  V inverse_y;  // this and the next only if x > 0 anywhere
  Lifted<V> up;

  template <int I>
  FASTVAE_INLINE NegativeBinomial(const Settings& settings, const V (&in)[I])
      : logarithmic(settings.counts.logarithmic),
        none(in[0] == V(0)),
        some(in[0] != V(0)),
        x(select(none, V(1), in[0])),
        log_unit(unit_of(logarithmic, in[1], in[2])),
        m(settings.counts, in[1] - log_unit, V(kLogMax)),
        of_theta(settings.counts, in[2] - log_unit, V(kLogMax)),
        theta(of_theta.above_0),
        inverse_y(0) {
    share = V(1) / (m.value + theta);
    v = (in[0] - m.value) * share;
    ratio = (in[0] + theta) * share;
    dev = log_deviance(v, ratio) + m.over + log_unit;
    if (!any(some)) return;
    inverse_y = V(1) / (x + theta);
    up = Lifted<V>(theta);
    if (logarithmic) up.log_step = up.log_step + (of_theta.under + log_unit);
  }

  // Minus the value where x = 0: theta ln(1 + m / theta) >= 0
  FASTVAE_INLINE V zero_loss() const { return theta * (dev - v); }

  // The value where x > 0, but for -1/2 ln `peak`.
  struct Above0 {
    V peak, rest;
  };
  FASTVAE_INLINE Above0 above_0() const {
    const V inverse = V(1) / x, y = x + theta;
    const V v_x = V(0) - theta * inverse * v;
    const V dev_x = log_deviance(v_x, m.above_0 * inverse * ratio) - m.under;
    V series = stirling(y, inverse_y) - stirling(x, inverse) - stirling_series(up.inverse);
    if (any(up.lifted)) series = series + step(up.z);
    return {x * V(Real<V>(kTwoPi)) * (y * up.inverse), series - fma(x, dev_x, theta * dev)};
  }

  FASTVAE_INLINE V value() const {
    const V at_0 = V(0) - zero_loss();
    if (!any(some)) return at_0;
    const Above0 above = above_0();
    return select(none, at_0, fma(V(-0.5), log_of_normal(above.peak), above.rest));
  }

  FASTVAE_INLINE V by_mean() const {
    const V slope = theta * v;  // by ln m
    if (logarithmic) return slope;
    return select(none, V(0) - theta * share, slope / m.value);
  }

  FASTVAE_INLINE V by_theta() const {
    V growth(0), more(0);  // gap(theta) - gap(y) of digamma_gap()
    if (any(some)) {
      const V apart = select(up.lifted, x - V(1), x);  // y - up.z, without that difference
      const V series = stirling_slope(up.inverse) - stirling_slope(inverse_y);
      growth = select(none, V(0), fma(V(0.5) * apart, up.inverse * inverse_y, series));
      if (any(up.lifted)) {
        more = select(none, V(0), step(theta));  // over theta, 1 / which may not be finite
        if (!logarithmic) growth = growth + more / theta;
      }
      const V y = x + theta;
      const auto fraction = some & (y < V(1));  // x is no whole number
      if (any(fraction)) {
        growth = select(fraction, digamma_gap(theta) - digamma_gap(y), growth);
        more = select(fraction, V(0), more);
      }
    }
    return logarithmic ? fma(theta, growth - dev, more) : growth - dev;
  }

  FASTVAE_INLINE V by_data() const {
    const V from = select(none, V(0), x), next = from + V(1), y = from + theta;
    const V gaps = digamma_gap(next) - digamma_gap(y);
    return log(m.above_0 * ratio / next) + m.under + gaps;
  }

 private:
  FASTVAE_INLINE static V unit_of(bool logarithmic, V log_m, V log_theta) {
    return logarithmic ? at_most(V(0), at_least(log_m, log_theta) - V(Rate<V>::kLogMin)) : V(0);
  }

  // Two such numbers can be added.
  static constexpr Real<V> kLogMax = sizeof(Real<V>) == sizeof(float) ? Real<V>(87) : Real<V>(708);

  // 1 + factor ln(theta / (theta + 1)) where theta is lifted.
  FASTVAE_INLINE V step(V factor) const {
    return select(up.lifted, fma(factor, up.log_step, V(1)), V(0));
  }
};

struct NegativeBinomialLogProb {
  static constexpr Signature signature{.name = "negative_binomial_log_prob",
                                       .operands = {"x", "mean", "theta"},
                                       .value = "log_prob",
                                       .rates = {"mean", "log"}};
  // Value and gradient have nearly everything in common.
  template <bool kValue, bool kGradient>
  struct Pass {
    static constexpr Step step{.inputs = 3,
                               .outputs = kGradient ? 3 : 0,
                               .value = kValue,
                               .row_grad = kGradient,
                               .slow = true,
                               .huge = true};
    template <class V, int O>
    FASTVAE_INLINE static V apply(Settings settings, const V (&in)[3], V grad_log_prob, V,
                                  V (&out)[O]) {
      const NegativeBinomial<V> nb(settings, in);
      if constexpr (kGradient) {
        auto& [grad_x, grad_mean, grad_theta] = out;
        grad_mean = grad_log_prob * nb.by_mean();
        grad_theta = grad_log_prob * nb.by_theta();
        grad_x = settings.counts.data_gradient ? grad_log_prob * nb.by_data() : V(0);
      }
      return kValue ? nb.value() : V(0);
    }
  };
  struct Forward : Pass<true, false> {};
  struct Backward : Pass<false, true> {};
  struct Both : Pass<true, true> {};
};

// ---- Zero-inflated negative binomial ------------------------------------------------------------
// With the logit l of an extra zero and a = zero_loss()
//   x > 0: -ln(1 + e^l) + the negative binomial's
//   x = 0: ln(s(l) + s(-l) e^-a) = ln(1 - s(-l) (1 - e^-a))

template <class V>
struct ExtraZero {
  V zero_loss, l;
  V u;                       // e^-|l|
  V extra, none;             // s(l) and s(-l): the probabilities of an extra zero and of none
  V other;                   // s(-l) e^-a, of another zero
  V some;                    // s(-l) (1 - e^-a), of none at all
  V zero;                    // of any
  decltype(V() < V()) tiny;  // where that and its parts are too small to be told

  FASTVAE_INLINE ExtraZero(V zero_loss, V l) : zero_loss(zero_loss), l(l) {
    u = exp(V(0) - magnitude(l)).exp;
    const V likely = V(1) / (V(1) + u), unlikely = u * likely;
    extra = select(l > V(0), likely, unlikely);
    none = select(l > V(0), unlikely, likely);
    const Exp<V> e = exp(V(0) - zero_loss);
    other = none * e.exp;
    some = V(0) - none * e.expm1;
    zero = select(some < V(0.5), V(1) - some, extra + other);
    tiny = zero < V(Constants<Real<V>>::smallest_normal);
  }

  // How probable it is that a zero is an extra one, and that it is another.
  struct Shares {
    V extra, other;
  };
  FASTVAE_INLINE Shares shares() const {
    const V inverse = V(1) / zero, smallest(Constants<Real<V>>::smallest_normal);
    Shares share{extra * inverse, other * inverse};
    const auto inexact = (extra < smallest) | (other < smallest);
    if (any(inexact)) {
      const V drive = zero_loss + l;
      share = {select(inexact, softplus(drive).sigmoid, share.extra),
               select(inexact, softplus(V(0) - drive).sigmoid, share.other)};
    }
    return share;
  }
};

template <class V>
FASTVAE_INLINE V log_prob(const NegativeBinomial<V>& nb, const ExtraZero<V>& zero) {
  using C = Constants<Real<V>>;
  // Both cases in one logarithm.
  typename NegativeBinomial<V>::Above0 above{V(1), V(0)};
  if (any(nb.some)) above = nb.above_0();
  const V sum = V(1) + zero.u;
  const Split<V> parts = split(select(nb.none, zero.zero, above.peak * (sum * sum)));
  const V e = to_real(parts.exponent);
  const auto near = nb.none & (zero.some < V(1 - C::sqrt_half)) & (e == V(0));
  const V y = log_of_parts(select(near, V(0) - zero.some, parts.mantissa - V(1)), e);
  const V some = fma(V(-0.5), y, above.rest - at_least(V(0), zero.l));
  const V value = select(nb.none, y, some);
  const auto tiny = nb.none & zero.tiny;
  if (!any(tiny)) return value;
  const V larger = at_least(V(0) - zero.zero_loss, zero.l);
  const V rest = softplus(V(0) - magnitude(zero.zero_loss + zero.l)).value;
  return select(tiny, larger + rest, value);
}

struct ZeroInflatedNegativeBinomialLogProb {
  static constexpr Signature signature{.name = "zero_inflated_negative_binomial_log_prob",
                                       .operands = {"x", "mean", "theta", "zero_logits"},
                                       .value = "log_prob",
                                       .rates = {"mean", "log"}};
  template <bool kValue, bool kGradient>
  struct Pass {
    static constexpr Step step{.inputs = 4,
                               .outputs = kGradient ? 4 : 0,
                               .value = kValue,
                               .row_grad = kGradient,
                               .slow = true,
                               .huge = true};
    template <class V, int O>
    FASTVAE_INLINE static V apply(Settings settings, const V (&in)[4], V grad_log_prob, V,
                                  V (&out)[O]) {
      const NegativeBinomial<V> nb(settings, in);
      const ExtraZero<V> zero(nb.zero_loss(), in[3]);
      if constexpr (kGradient) {
        auto& [grad_x, grad_mean, grad_theta, grad_l] = out;
        const auto share = zero.shares();
        const V weight = grad_log_prob * select(nb.none, share.other, V(1));
        grad_mean = weight * nb.by_mean();
        grad_theta = weight * nb.by_theta();
        grad_l = grad_log_prob * select(nb.none, share.extra * zero.some, V(0) - zero.extra);
        grad_x = settings.counts.data_gradient ? weight * nb.by_data() : V(0);
      }
      return kValue ? log_prob(nb, zero) : V(0);
    }
  };
  struct Forward : Pass<true, false> {};
  struct Backward : Pass<false, true> {};
  struct Both : Pass<true, true> {};
};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
