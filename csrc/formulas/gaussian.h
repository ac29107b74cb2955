// One struct per op, forward beside backward, over one number or a vector, on host and device.
//
// Notation: q = N(mu, sigma^2), read from (mu, s) with `s` in the caller's parameterization, and
// h = ln sigma = logvar / 2. Gradients with respect to s go through dh/ds. The loops (cpu/loops.h,
// cuda/loops.cuh) hand each step its inputs, the noise and the upstream gradient of the summed
// value, and take the outputs and the value to sum.
//
// e^t - 1 - t is never formed by subtraction: near posterior collapse (mu, logvar -> 0) that would
// lose every digit. With E = expm1(h) and T = e^h - 1 - h >= 0 from one polynomial (math.h),
//   e^{2h} - 1      = E (E + 2)
//   e^{2h} - 1 - 2h = E^2 + 2 T
// are sums of terms of one sign, and e^h = sigma comes with them.
#pragma once

#include "../plan.h"
#include "../signature.h"
#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// s as a bound, or a floor of sigma, leaves it.
template <class V>
struct Bounded {
  V s;
  V slope;  // its derivative by s
};

struct Scale : ScaleForm {
  FASTVAE_INLINE Scale(const Settings& settings) : ScaleForm(settings.scale) {}

  // Soft, with high' = high - softplus(high - s): low + softplus(high' - low). What softplus is
  // above max(t, 0) is all that is added, so that s far from both ends keeps its digits.
  template <class V>
  FASTVAE_INLINE Bounded<V> bounded(V s) const {
    if (bounding == Bounding::none) return {s, V(1)};
    if (bounding == Bounding::raised) return raise(s);
    if (bounding == Bounding::tanh) {
      const V half = V(Real<V>(0.5 * (high - low))), middle = V(Real<V>(0.5 * (high + low)));
      const V t = tanh((s - middle) / half);
      return {fma(half, t, middle), fma(V(0) - t, t, V(1))};
    }
    const V floor = V(Real<V>(low)), ceiling = V(Real<V>(high));
    if (bounding == Bounding::soft) {
      V slope(1);
      if (high < Constants<double>::infinity) {
        const Softplus<V> below = softplus(ceiling - s);
        s = at_most(ceiling, s) - below.tail;
        slope = below.sigmoid;
      }
      if (low > -Constants<double>::infinity) {
        const Softplus<V> above = softplus(s - floor);
        s = at_least(floor, s) + above.tail;
        slope = slope * above.sigmoid;
      }
      return {s, slope};
    }
    const V hard_slope = select((s >= floor) & (ceiling >= s), V(1), V(0));
    return {at_least(floor, at_most(ceiling, s)), bounding == Bounding::hard ? hard_slope : V(1)};
  }
  // ln(f(s) + floor). Of f = e^a that is softplus(a - ln floor) + ln floor, which nothing exceeds;
  // and where softplus(s) underflows, ln softplus(s) is s - e^s / 2, without a floor.
  template <class V>
  FASTVAE_INLINE Bounded<V> raise(V s) const {
    const V floor = V(Real<V>(low)), log_floor = V(Real<V>(high));
    if (raised == Raised::logvar || raised == Raised::log_std) {
      const V unit = V(Real<V>(raised == Raised::logvar ? 0.5 : 1)), a = unit * s;
      if (low == 0) return {a, unit};
      const Softplus<V> above = softplus(a - log_floor);
      return {at_least(log_floor, a) + above.tail, unit * above.sigmoid};
    }
    if (raised == Raised::softplus) {
      const Softplus<V> soft = softplus(s);
      const V sigma = soft.value + floor;
      const V small = V(0.5) * soft.sigmoid;
      const auto tiny = s < V(low == 0 ? -20 : -Constants<double>::infinity);
      return {select(tiny, s - small, log(sigma)),
              select(tiny, V(1) - small, soft.sigmoid / sigma)};
    }
    const bool is_variance = raised == Raised::var;
    const V f = is_variance ? sqrt(s) : select(s < V(0), V(Constants<Real<V>>::nan), s);
    const V sigma = f + floor;
    return {log(sigma), (is_variance ? V(0.5) / f : V(1)) / sigma};
  }
  // The gradient by s, from that by s within the bound. Beyond a hard end it is 0, as torch.clamp's
  // is, even where the other has overflowed.
  template <class V>
  FASTVAE_INLINE V bounded_backward(V slope, V grad) const {
    return bounding == Bounding::hard ? select(slope == V(0), V(0), grad) : grad * slope;
  }

  template <class V>
  FASTVAE_INLINE V log_sigma(V s) const {
    return V(factor) * (logarithmic ? s : log(s));
  }
  // `exp_h` is e^h, where a formula has it already. NaN below 0, as the logarithm is.
  template <class V>
  FASTVAE_INLINE V sigma(V s, V exp_h) const {
    if (logarithmic) return exp_h;
    if (factor == 0.5f) return sqrt(s);
    return select(s < V(0), V(Constants<Real<V>>::nan), s);
  }
  template <class V>
  FASTVAE_INLINE V sigma(V s) const {
    return sigma(s, logarithmic ? exp(V(factor) * s).exp : s);
  }
  template <class V>
  FASTVAE_INLINE V inverse_sigma(V s) const {
    if (logarithmic) return exp(V(-factor) * s).exp;
    return V(1) / sigma(s);
  }
  // dh/ds
  template <class V>
  FASTVAE_INLINE V log_sigma_slope(V s) const {
    return logarithmic ? V(factor) : V(factor) / s;
  }
  // d sigma / ds, finite at s = std = 0
  template <class V>
  FASTVAE_INLINE V sigma_slope(V s, V exp_h) const {
    if (logarithmic) return V(factor) * exp_h;
    if (factor == 0.5f) return V(0.5) / sqrt(s);
    return select(s < V(0), V(Constants<Real<V>>::nan), V(1));
  }
  template <class V>
  FASTVAE_INLINE V sigma_slope(V s) const {
    return sigma_slope(s, logarithmic ? exp(V(factor) * s).exp : s);
  }
};

// The inputs of a step backward are those of its step forward, then the gradient of z if there is a
// z; output k is the gradient of input k. Operands are read by name: `const auto& [mu, s] = in;`

// ---- z = mu + sigma eps -------------------------------------------------------------------------

struct Rsample {
  static constexpr Signature signature{
      .name = "rsample", .operands = {"mu", "logvar"}, .gaussians = true, .samples = true};
  struct Forward {
    static constexpr Step step{.inputs = 2, .outputs = 1, .noise = true, .bounded_input = 1};
    template <class V>
    FASTVAE_INLINE static V apply(Scale scale, const V (&in)[2], V, V eps, V (&out)[1]) {
      const auto& [mu, s] = in;
      out[0] = fma(scale.sigma(s), eps, mu);
      return V(0);
    }
  };
  struct Backward {
    static constexpr Step step{.inputs = 3, .outputs = 2, .noise = true, .bounded_input = 1};
    template <class V>
    FASTVAE_INLINE static V apply(Scale scale, const V (&in)[3], V, V eps, V (&out)[2]) {
      const V &s = in[1], &grad_z = in[2];
      auto& [grad_mu, grad_s] = out;
      grad_mu = grad_z;
      grad_s = grad_z * eps * scale.sigma_slope(s);
      return V(0);
    }
  };
};

// ---- KL(q || p), p = N(0, 1) or N(prior_mu, prior_sigma^2) --------------------------------------

// The divergence, and q's sigma for those who sample too; what is not used costs nothing.
template <class V>
struct KL {
  V value, sigma;
};

// to N(0, 1): 1/2 (mu^2 + e^{2h} - 1 - 2h)
template <class V>
FASTVAE_INLINE KL<V> kl(Scale scale, const V (&q)[2]) {
  const auto& [mu, s] = q;
  const Exp<V> e = exp(scale.log_sigma(s));
  return {fma(V(0.5) * mu, mu, fma(e.half_expm1, e.expm1, e.tail)), scale.sigma(s, e.exp)};
}

// Returns d sigma / ds of q.
template <class V>
FASTVAE_INLINE V kl_backward(Scale scale, V grad_kl, const V (&q)[2], V (&grad)[2]) {
  const auto& [mu, s] = q;
  auto& [grad_mu, grad_s] = grad;
  const Exp<V> e = exp(scale.log_sigma(s));
  grad_mu = grad_kl * mu;
  grad_s = grad_kl * (e.expm1 * (e.expm1 + V(2))) * scale.log_sigma_slope(s);
  return scale.sigma_slope(s, e.exp);
}

// to p: 1/2 (e^{2d} - 1 - 2d + w^2), d = h_q - h_p, w = (mu_q - mu_p) / sigma_p
template <class V>
FASTVAE_INLINE KL<V> kl(Scale scale, const V (&qp)[4]) {
  const auto& [mu, s, prior_mu, prior_s] = qp;
  const Exp<V> e = exp(scale.log_sigma(s) - scale.log_sigma(prior_s));
  const V w = safe_product(mu - prior_mu, scale.inverse_sigma(prior_s));
  return {fma(V(0.5) * w, w, fma(e.half_expm1, e.expm1, e.tail)), scale.sigma(s)};
}

template <class V>
FASTVAE_INLINE V kl_backward(Scale scale, V grad_kl, const V (&qp)[4], V (&grad)[4]) {
  const auto& [mu, s, prior_mu, prior_s] = qp;
  auto& [grad_mu, grad_s, grad_prior_mu, grad_prior_s] = grad;
  const V expm1 = exp(scale.log_sigma(s) - scale.log_sigma(prior_s)).expm1;
  const V growth = expm1 * (expm1 + V(2));  // e^{2d} - 1
  const V inverse = scale.inverse_sigma(prior_s);
  const V w = safe_product(mu - prior_mu, inverse);
  grad_mu = grad_kl * safe_product(w, inverse);
  grad_s = grad_kl * growth * scale.log_sigma_slope(s);
  grad_prior_mu = V(0) - grad_mu;
  grad_prior_s = V(0) - grad_kl * fma(w, w, growth) * scale.log_sigma_slope(prior_s);
  return scale.sigma_slope(s);
}

// N = 2: the prior is N(0, 1); N = 4: it is given.
template <int N>
struct KLDivergence {
  static constexpr Signature signature{.name = "kl_divergence",
                                       .operands = {"mu", "logvar", "prior_mu", "prior_logvar"},
                                       .value = "kl",
                                       .gaussians = true};
  struct Forward {
    static constexpr Step step{.inputs = N, .outputs = 0, .value = true, .bounded_input = 1};
    template <class V>
    FASTVAE_INLINE static V apply(Scale scale, const V (&in)[N], V, V, V (&)[1]) {
      return kl(scale, in).value;
    }
  };
  struct Backward {
    static constexpr Step step{.inputs = N, .outputs = N, .row_grad = true, .bounded_input = 1};
    template <class V>
    FASTVAE_INLINE static V apply(const Settings& settings, const V (&in)[N], V grad_kl, V,
                                  V (&out)[N]) {
      kl_backward(Scale(settings), grad_kl, in, out);
      if constexpr (N == 4) {
        const V to_q(Real<V>(settings.to_q)), to_p(Real<V>(settings.to_p));
        for (int i = 0; i < 4; ++i) out[i] = out[i] * (i < 2 ? to_q : to_p);
      }
      return V(0);
    }
  };
};

// With the gradients of alpha KL(stopped q || p) + (1 - alpha) KL(q || stopped p): 1 - alpha of q's
// and alpha of p's.
struct BalancedKLDivergence {
  static constexpr Signature signature{.name = "balanced_kl_divergence",
                                       .operands = {"mu", "logvar", "prior_mu", "prior_logvar"},
                                       .value = "kl",
                                       .gaussians = true,
                                       .balances = true};
  using Forward = KLDivergence<4>::Forward;
  using Backward = KLDivergence<4>::Backward;
};

// ---- z and KL in one pass -----------------------------------------------------------------------

template <int N>
struct RsampleKL {
  static constexpr Signature signature{.name = "rsample_kl",
                                       .operands = {"mu", "logvar", "prior_mu", "prior_logvar"},
                                       .value = "kl",
                                       .gaussians = true};
  // Backward where only one of the two has a gradient.
  using WithoutZ = KLDivergence<N>;
  using WithoutValue = Rsample;
  struct Forward {
    static constexpr Step step{
        .inputs = N, .outputs = 1, .noise = true, .value = true, .bounded_input = 1};
    template <class V>
    FASTVAE_INLINE static V apply(Scale scale, const V (&in)[N], V, V eps, V (&out)[1]) {
      const auto [divergence, sigma] = kl(scale, in);
      out[0] = fma(sigma, eps, in[0]);
      return divergence;
    }
  };
  struct Backward {
    static constexpr Step step{
        .inputs = N + 1, .outputs = N, .noise = true, .row_grad = true, .bounded_input = 1};
    template <class V>
    FASTVAE_INLINE static V apply(Scale scale, const V (&in)[N + 1], V grad_kl, V eps,
                                  V (&out)[N]) {
      V gaussians[N];
      for (int i = 0; i < N; ++i) gaussians[i] = in[i];
      const V grad_z = in[N];
      const V sigma_slope = kl_backward(scale, grad_kl, gaussians, out);
      out[0] = out[0] + grad_z;
      out[1] = fma(grad_z * eps, sigma_slope, out[1]);
      return V(0);
    }
  };
};

// ---- z and the log-ratio ln p(z) - ln q(z) in one pass ------------------------------------------
// h_q - h_p + 1/2 (eps^2 - w^2),  w = (z - mu_p) / sigma_p. Since z is mu + sigma eps, eps stands
// for (z - mu) / sigma, which would lose what z was rounded to.

template <class V>
struct LogRatio {
  V z, sigma, w, inverse_prior_sigma;
};

template <class V>
FASTVAE_INLINE LogRatio<V> log_ratio(Scale scale, const V (&q)[2], V eps) {
  const V sigma = scale.sigma(q[1]), z = fma(sigma, eps, q[0]);
  return {z, sigma, z, V(1)};
}

template <class V>
FASTVAE_INLINE LogRatio<V> log_ratio(Scale scale, const V (&qp)[4], V eps) {
  const auto& [mu, s, prior_mu, prior_s] = qp;
  const V sigma = scale.sigma(s), inverse = scale.inverse_sigma(prior_s);
  // Not z - mu_p, which has the error of rounding z: large where |mu| >> sigma.
  const V w = safe_product(fma(sigma, eps, mu - prior_mu), inverse);
  return {fma(sigma, eps, mu), sigma, w, inverse};
}

template <int N>
struct RsampleLogRatio {
  static constexpr Signature signature{.name = "rsample_log_ratio",
                                       .operands = {"mu", "logvar", "prior_mu", "prior_logvar"},
                                       .value = "log_ratio",
                                       .gaussians = true,
                                       .samples = true,
                                       .path = true};
  using WithoutValue = Rsample;
  struct Forward {
    static constexpr Step step{
        .inputs = N, .outputs = 1, .noise = true, .value = true, .bounded_input = 1};
    template <class V>
    FASTVAE_INLINE static V apply(Scale scale, const V (&in)[N], V, V eps, V (&out)[1]) {
      const LogRatio<V> r = log_ratio(scale, in, eps);
      V h = scale.log_sigma(in[1]);
      if constexpr (N == 4) h = h - scale.log_sigma(in[3]);
      out[0] = r.z;
      return fma(V(0.5) * (eps - r.w), eps + r.w, h);
    }
  };
  // d/dz (ln p(z) - ln q(z; mu, sigma constant)) is -w / sigma_p + eps / sigma. What the parameters
  // of ln q contribute besides, the score, is -eps / sigma for mu and 1 - eps^2 for h: in all 0 and
  // 1, which is the gradient where it is not `path`.
  struct Backward {
    static constexpr Step step{
        .inputs = N + 1, .outputs = N, .noise = true, .row_grad = true, .bounded_input = 1};
    template <class V>
    FASTVAE_INLINE static V apply(const Settings& settings, const V (&in)[N + 1], V grad_ratio,
                                  V eps, V (&out)[N]) {
      const Scale scale(settings);
      V gaussians[N];
      for (int i = 0; i < N; ++i) gaussians[i] = in[i];
      const V &s = in[1], &grad_z = in[N];
      const LogRatio<V> r = log_ratio(scale, gaussians, eps);
      const V pull = safe_product(r.w, r.inverse_prior_sigma);
      V slope = V(0) - pull;
      if (settings.path) slope = slope + eps / r.sigma;
      out[0] = fma(grad_ratio, slope, grad_z);
      out[1] = out[0] * eps * scale.sigma_slope(s);
      if (!settings.path) out[1] = fma(grad_ratio, scale.log_sigma_slope(s), out[1]);
      if constexpr (N == 4) {
        out[2] = grad_ratio * pull;
        out[3] = grad_ratio * fma(r.w, r.w, V(-1)) * scale.log_sigma_slope(in[3]);
      }
      return V(0);
    }
  };
};

// ---- log N(x; mean, sigma^2) --------------------------------------------------------------------
// -1/2 w^2 - h - 1/2 ln 2 pi,  w = (x - mean) / sigma

struct GaussianLogProb {
  static constexpr Signature signature{.name = "gaussian_log_prob",
                                       .operands = {"x", "mean", "logvar"},
                                       .value = "log_prob",
                                       .number = "scale"};
  struct Forward {
    static constexpr Step step{
        .inputs = 3, .outputs = 0, .value = true, .scale_input = 2, .bounded_input = 2};
    template <class V>
    FASTVAE_INLINE static V apply(Scale scale, const V (&in)[3], V, V, V (&)[1]) {
      const auto& [x, mean, s] = in;
      const V half_log_two_pi(Real<V>(0.918938533204672741780329736406));
      const V w = safe_product(x - mean, scale.inverse_sigma(s));
      return fma(V(-0.5) * w, w, V(0) - scale.log_sigma(s)) - half_log_two_pi;
    }
  };
  struct Backward {
    static constexpr Step step{
        .inputs = 3, .outputs = 3, .row_grad = true, .scale_input = 2, .bounded_input = 2};
    template <class V>
    FASTVAE_INLINE static V apply(Scale scale, const V (&in)[3], V grad_log_prob, V, V (&out)[3]) {
      const auto& [x, mean, s] = in;
      auto& [grad_x, grad_mean, grad_s] = out;
      const V inverse = scale.inverse_sigma(s);
      const V w = safe_product(x - mean, inverse);
      grad_mean = grad_log_prob * safe_product(w, inverse);
      grad_x = V(0) - grad_mean;
      grad_s = grad_log_prob * fma(w, w, V(-1)) * scale.log_sigma_slope(s);
      return V(0);
    }
  };
};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
