// The log-probabilities of pixels other than the Gaussian's, as the structs of gaussian.h.
//
// A logistic function s(a) = 1 / (1 + e^-a) that is near 1 is never subtracted from 1: what is
// summed is the small 1 - s(a) = s(-a) and what is exact.
#pragma once

#include "../plan.h"
#include "../signature.h"
#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// ---- Bernoulli with logits ----------------------------------------------------------------------

// How far x is from the value that the sign of the logit l calls likely, 1 or 0; negative for 1.
template <class V>
FASTVAE_INLINE V surprise(V x, V l) {
  return x - select(l > V(0), V(1), V(0));
}

// x l - ln(1 + e^l) = surprise l - ln(1 + e^-|l|)
struct BernoulliLogProb {
  static constexpr Signature signature{
      .name = "bernoulli_log_prob", .operands = {"x", "logits"}, .value = "log_prob"};
  struct Forward {
    static constexpr Step step{.inputs = 2, .outputs = 0, .value = true};
    template <class V>
    FASTVAE_INLINE static V apply(Settings, const V (&in)[2], V, V, V (&)[1]) {
      const auto& [x, l] = in;
      return fma(surprise(x, l), l, V(0) - softplus(l).tail);
    }
  };
  struct Backward {
    static constexpr Step step{.inputs = 2, .outputs = 2, .row_grad = true};
    template <class V>
    FASTVAE_INLINE static V apply(Settings, const V (&in)[2], V grad_log_prob, V, V (&out)[2]) {
      const auto& [x, l] = in;
      auto& [grad_x, grad_l] = out;
      const V tail = softplus(l).tail_sigmoid;
      grad_x = grad_log_prob * l;
      grad_l = grad_log_prob * (surprise(x, l) + select(l > V(0), tail, V(0) - tail));
      return V(0);
    }
  };
};

// ---- Continuous Bernoulli -----------------------------------------------------------------------

// ln(sinh(h) / h) at h = t / 2, and its derivative by t over t, from t^2: |t| <= 1/2.
template <class V>
struct LogSinhc {
  V value, slope_over_t;
};

template <class V>
FASTVAE_INLINE LogSinhc<V> log_sinhc(V t2) {
  using R = Real<V>;
  const R values[] = {R(1. / 24),           R(-1. / 2880),     R(1. / 181440),
                      R(-1. / 9676800),     R(1. / 479001600), R(-691. / 15692092416000),
                      R(1. / 1046139494400)};
  const R slopes[] = {R(1. / 12),         R(-1. / 720),     R(1. / 30240),
                      R(-1. / 1209600),   R(1. / 47900160), R(-691. / 1307674368000),
                      R(1. / 74724249600)};
  return {t2 * polynomial(t2, values), polynomial(t2, slopes)};
}

// ln of e^{x l} l / (e^l - 1)
//   = surprise l - ln((1 - e^-|l|) / |l|)
//   = (x - 1/2) l - ln(sinh(l / 2) / (l / 2)) near l = 0
struct ContinuousBernoulliLogProb {
  static constexpr Signature signature{
      .name = "continuous_bernoulli_log_prob", .operands = {"x", "logits"}, .value = "log_prob"};
  template <class V>
  FASTVAE_INLINE static auto near_half(V l) {
    return magnitude(l) < V(0.5);
  }
  struct Forward {
    static constexpr Step step{.inputs = 2, .outputs = 0, .value = true};
    template <class V>
    FASTVAE_INLINE static V apply(Settings, const V (&in)[2], V, V, V (&)[1]) {
      const auto& [x, l] = in;
      const V t = magnitude(l);
      const V near = fma(x - V(0.5), l, V(0) - log_sinhc(l * l).value);
      const V mean_decay = (V(0) - exp(V(0) - t).expm1) / t;
      const V far = fma(surprise(x, l), l, V(0) - log(mean_decay));
      return select(near_half(l), near, far);
    }
  };
  struct Backward {
    static constexpr Step step{.inputs = 2, .outputs = 2, .row_grad = true};
    template <class V>
    FASTVAE_INLINE static V apply(Settings, const V (&in)[2], V grad_log_prob, V, V (&out)[2]) {
      const auto& [x, l] = in;
      auto& [grad_x, grad_l] = out;
      const V t = magnitude(l);
      const V near = fma(V(0) - l, log_sinhc(l * l).slope_over_t, x - V(0.5));
      const V tail = V(1) / t - V(1) / exp(t).expm1;
      const V far = surprise(x, l) + select(l > V(0), tail, V(0) - tail);
      grad_x = grad_log_prob * l;
      grad_l = grad_log_prob * select(near_half(l), near, far);
      return V(0);
    }
  };
};

// ---- Laplace ------------------------------------------------------------------------------------
// -|x - m| / b - ln b - ln 2 with b = e^s

struct LaplaceLogProb {
  static constexpr Signature signature{.name = "laplace_log_prob",
                                       .operands = {"x", "mean", "log_scale"},
                                       .value = "log_prob",
                                       .number = "scale"};
  struct Forward {
    static constexpr Step step{.inputs = 3, .outputs = 0, .value = true, .scale_input = 2};
    template <class V>
    FASTVAE_INLINE static V apply(Settings, const V (&in)[3], V, V, V (&)[1]) {
      const auto& [x, mean, s] = in;
      const V log_two(Real<V>(0.693147180559945309417232121458));
      const V distance = safe_product(magnitude(x - mean), exp(V(0) - s).exp);
      return (V(0) - distance - s) - log_two;
    }
  };
  struct Backward {
    static constexpr Step step{.inputs = 3, .outputs = 3, .row_grad = true, .scale_input = 2};
    template <class V>
    FASTVAE_INLINE static V apply(Settings, const V (&in)[3], V grad_log_prob, V, V (&out)[3]) {
      const auto& [x, mean, s] = in;
      auto& [grad_x, grad_mean, grad_s] = out;
      const V difference = x - mean, inverse = exp(V(0) - s).exp;
      const V sign = select(difference > V(0), V(1), select(difference < V(0), V(-1), V(0)));
      grad_mean = safe_product(grad_log_prob * sign, inverse);
      grad_x = V(0) - grad_mean;
      grad_s = grad_log_prob * (safe_product(magnitude(difference), inverse) - V(1));
      return V(0);
    }
  };
};

// ---- Discretized logistic -----------------------------------------------------------------------
// The mass s(upper) - s(lower) of x's bin, upper = (x + w/2 - m) / b, lower = (x - w/2 - m) / b,
// b = e^s. By symmetry let x >= m; then with w / b = upper - lower
//
//   ln s(-lower) + ln s(upper) + ln(1 - e^{-w / b})
//
// and the first of these alone in the outermost bins, which end at infinity, where x - m is counted
// as positive outwards.

template <class V>
struct LogisticBin {
  decltype(V() < V()) first, last, outermost;
  V outward, inverse;        // |x - m|, or x - m outwards; 1 / b
  V lower_end, upper_end;    // before the division by b
  Softplus<V> lower, upper;  // of lower and -upper

  FASTVAE_INLINE LogisticBin(const Levels& levels, const V (&in)[3])
      : first(in[0] < V(Real<V>(levels.first_end))),
        last(in[0] > V(Real<V>(levels.last_begin))),
        outermost(first | last) {
    const auto& [x, mean, s] = in;
    const V half_width(Real<V>(levels.half_width));
    const V difference = x - mean;
    outward = select(last, difference, select(first, V(0) - difference, magnitude(difference)));
    inverse = exp(V(0) - s).exp;
    lower_end = outward - half_width;
    upper_end = outward + half_width;
    lower = softplus(safe_product(lower_end, inverse));
    upper = softplus(V(0) - safe_product(upper_end, inverse));
  }
};

// ln(1 - e^{-w / b}), and its derivative by s = ln b
template <class V>
struct LogDecay {
  V value, slope;

  FASTVAE_INLINE LogDecay(const Levels& levels, V s, V inverse) {
    const V t = V(Real<V>(2 * levels.half_width)) * inverse;
    const auto near = t < V(0.5);
    const LogSinhc<V> sinhc = log_sinhc(t * t);
    const Exp<V> e = exp(V(0) - t);
    const V decay = V(0) - e.expm1;
    // Near 0, ln t is known, even where t is not.
    const V log_t = V(Real<V>(levels.log_width)) - s;
    value = select(near, fma(V(-0.5), t, log_t) + sinhc.value, log(decay));
    const V far = V(0) - safe_product(e.exp / decay, t);
    slope = select(near, fma(t, fma(V(0) - t, sinhc.slope_over_t, V(0.5)), V(-1)), far);
  }
};

struct DiscretizedLogisticLogProb {
  static constexpr Signature signature{.name = "discretized_logistic_log_prob",
                                       .operands = {"x", "mean", "log_scale"},
                                       .value = "log_prob",
                                       .levels = true};
  struct Forward {
    static constexpr Step step{.inputs = 3, .outputs = 0, .value = true, .slow = true};
    template <class V>
    FASTVAE_INLINE static V apply(Settings settings, const V (&in)[3], V, V, V (&)[1]) {
      const LogisticBin<V> bin(settings.levels, in);
      const LogDecay<V> decay(settings.levels, in[2], bin.inverse);
      return select(bin.outermost, V(0), decay.value - bin.upper.value) - bin.lower.value;
    }
  };
  struct Backward {
    static constexpr Step step{.inputs = 3, .outputs = 3, .row_grad = true, .slow = true};
    template <class V>
    FASTVAE_INLINE static V apply(Settings settings, const V (&in)[3], V grad_log_prob, V,
                                  V (&out)[3]) {
      auto& [grad_x, grad_mean, grad_s] = out;
      const LogisticBin<V> bin(settings.levels, in);
      const LogDecay<V> decay(settings.levels, in[2], bin.inverse);
      // s(lower) - s(-upper), without a subtraction
      const V decline = exp(V(-2) * safe_product(bin.outward, bin.inverse)).expm1;
      const V inside = (V(0) - decline) * bin.lower.sigmoid * (V(1) - bin.upper.sigmoid);
      const V pull = grad_log_prob * select(bin.outermost, bin.lower.sigmoid, inside);
      const V inwards = V(0) - pull;
      const V upwards = select(bin.last | (in[0] > in[1]), pull, inwards);
      grad_mean = safe_product(select(bin.first, inwards, upwards), bin.inverse);
      grad_x = V(0) - grad_mean;
      const V lower = bin.lower_end * bin.lower.sigmoid;
      const V upper = bin.upper_end * bin.upper.sigmoid;
      const V ends = select(bin.outermost, lower, lower - upper);
      const V width = select(bin.outermost, V(0), decay.slope);
      grad_s = grad_log_prob * (safe_product(ends, bin.inverse) + width);
      return V(0);
    }
  };
};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
