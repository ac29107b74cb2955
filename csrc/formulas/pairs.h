// A row z and a component N(mu, diag sigma^2) of a mixture, over one number or a vector of
// components, on host and device:
//
//     ln N(z) = -1/2 sum_d t_d^2 + sum_d c_d,   t = (z - mu) / sigma,   c = -ln sigma - 1/2 ln 2 pi
//
// Never t^2 by its three terms: z^2 - 2 z mu + mu^2 is what a product of matrices can compute, and
// loses the digits that z and mu have in common.
//
// Gradients, for the upstream gradient w of ln N(z), with u = mu - z, are kept as sums of w u and
// w u^2 and divided by sigma^2 at the end, once for a component:
//
//     d/dz = w u / sigma^2,   d/dmu = -w u / sigma^2,   d/dh = w (u^2 / sigma^2 - 1),   h = ln
//     sigma
#pragma once

#include "gaussian.h"
#include "log_sums.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

struct PairwiseLogProb {
  static constexpr Signature signature{.name = "pairwise_log_prob",
                                       .operands = {"z", "mu", "logvar"},
                                       .value = "log_prob",
                                       .loop = Loop::pairs};
};
struct MixtureLogProb {
  static constexpr Signature signature{.name = "mixture_log_prob",
                                       .operands = {"z", "mu", "logvar", "log_weights"},
                                       .value = "log_prob",
                                       .loop = Loop::pairs,
                                       .optional = true,
                                       .weighs = true,
                                       .keeps = "log_sums"};
};

// Finite as its square is, so that a weight of 0 has no gradient whatever sigma is.
template <class V>
FASTVAE_INLINE V precision_root(Scale scale, V s) {
  constexpr bool kDouble = sizeof(Real<V>) == sizeof(double);
  return at_most(V(Real<V>(kDouble ? 0x1p500 : 0x1p62)), scale.inverse_sigma(s));
}

template <class V>
FASTVAE_INLINE V log_constant(Scale scale, V s) {
  return V(Real<V>(-0.91893853320467274178)) - scale.log_sigma(s);
}

template <class V>
FASTVAE_INLINE V add_square(V sum, V z, V mu, V inverse_sigma) {
  const V t = (z - mu) * inverse_sigma;
  return fma(t, t, sum);
}

// ln N, of the sum of all t^2 and that of all c, with what weighs it.
template <class V>
FASTVAE_INLINE V log_density(V squares, V constant) {
  return fma(squares, V(Real<V>(-0.5)), constant);
}

// The logarithm of a sum that backward divides by. Of no weight at all, nothing is a share.
FASTVAE_INLINE double kept_log_sum(double log_sum, double sum) {
  return sum == 0 ? Constants<double>::infinity : log_sum;
}

// The sums that gradients of a component are made of.
template <class V>
struct ComponentSums {
  V first, second;  // of w u, of w u^2

  FASTVAE_INLINE void add(V weight, V z, V mu) {
    const V u = mu - z, v = weight * u;
    first = first + v;
    second = fma(v, u, second);
  }
};
template <class V>
FASTVAE_INLINE V gradient_of_mu(V first, V inverse_sigma) {
  return V(0) - first * inverse_sigma * inverse_sigma;
}
template <class V>
FASTVAE_INLINE V gradient_of_s(Scale scale, V s, V second, V weights, V inverse_sigma) {
  return (second * inverse_sigma * inverse_sigma - weights) * scale.log_sigma_slope(s);
}

// d ln N / dz, times w, added up over components.
template <class V>
FASTVAE_INLINE V add_gradient_of_z(V sum, V weight, V z, V mu, V precision) {
  return fma(weight * (mu - z), precision, sum);
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
