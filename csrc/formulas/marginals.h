// One dimension of a component by itself. Its weight w N(z; mu, sigma^2) is 2^-q relative to the
// highest that any component reaches anywhere, with
//
//     q = cost + t^2,   t = (z - mu) / sigma sqrt(log2(e) / 2),   cost = log2 of that - log2 of w
//     N(mu)
#pragma once

#include "pairs.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

constexpr double kMarginalRoot = 0.84932180028801904272;  // sqrt(log2(e) / 2)
// By 1 / sigma^2 where t^2 stands for it.
constexpr double kMarginalPrecision = 1 / (kMarginalRoot * kMarginalRoot);
// A row of a smaller sum is far from all components, and is done again in double.
constexpr double kFarSum = 0x1p-13;

template <class V>
FASTVAE_INLINE V marginal_root(Scale scale, V s) {
  return precision_root(scale, s) * V(Real<V>(kMarginalRoot));
}
FASTVAE_INLINE double highest_log2(Scale scale, double s, double log_weight) {
  return kLog2e * (log_constant(scale, s) + log_weight);
}
template <class V>
FASTVAE_INLINE V marginal_weight(V cost, V z, V mu, V root) {
  return weight(add_square(cost, z, mu, root));
}
// By which the pair of a row with the component of its own number weighs more than others.
template <class T>
FASTVAE_INLINE T own_factor(double log_own, double log_other) {
  return T(exp(log_own - log_other).exp);
}
// The logarithm of a sum of such weights.
FASTVAE_INLINE double log_of_marginal(double highest_log2, double sum) {
  return log_of_sum(highest_log2 / kLog2e, sum);
}
// And back, with what the logarithm loses by narrowing.
template <class T>
FASTVAE_INLINE T sum_of_marginal(double highest_log2, double log_sum) {
  const double log = log_sum - highest_log2 / kLog2e;
  const T digits = T(log);
  return exp(digits).exp * (1 + T(log - digits));
}
FASTVAE_INLINE double far_log_density(Scale scale, double z, double mu, double s) {
  return log_density(add_square(0.0, z, mu, precision_root(scale, s)), log_constant(scale, s));
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
