// The logarithm of a sum of exponentials, relative to the largest, over one number or a vector, on
// host and device.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

constexpr double kLog2e = 1.4426950408889634074;

// 2^-q for q >= 0: what a component weighs against one of weight 1. 0 below 10^-26 (in double
// 10^-130), which no sum notices: numbers near the smallest would make every product with them take
// a hundred times as long.
template <class V>
FASTVAE_INLINE V weight(V q) {
  using C = Constants<Real<V>>;
  constexpr bool kDouble = sizeof(Real<V>) == sizeof(double);
  const V shifted = V(C::round_magic) - q;
  const V n = shifted - V(C::round_magic);
  const V r = (q + n) * V(Real<V>(-0.69314718055994530942));  // -q = n + r / ln 2
  const V r2 = r * r;
  const V expm1 = fma(r2, exp_polynomial(r, r2), r);
  const V power = as_real((as_int(shifted) + Int<V>(C::exponent_bias)) << C::mantissa_bits);
  return select(q >= V(Real<V>(kDouble ? 430 : 86)), V(0), fma(power, expm1, power));
}

// log - total in powers of 1/2. Taken in the type of the logarithms, and narrowed then.
template <class V>
FASTVAE_INLINE V halvings(V log, V total) {
  return (total - log) * V(Real<V>(kLog2e));
}
// e^(log - total), for a `total` that is not below.
template <class V>
FASTVAE_INLINE V share(V log, V total) {
  return weight(halvings(log, total));
}
// The same for a total that is below only by its rounding.
template <class V>
FASTVAE_INLINE V share_of_all(V log, V total) {
  return weight(at_least(V(0), halvings(log, total)));
}

// The same of logarithms that have more digits than it needs.
template <class T>
FASTVAE_INLINE T narrow_share_of_all(double log, double total) {
  return weight(at_least(T(0), T(halvings(log, total))));
}

// What the exponents are relative to. Where all are -inf 0 serves as well.
template <class V>
FASTVAE_INLINE V shift_of(V largest) {
  return select(largest == V(-Constants<Real<V>>::infinity), V(0), largest);
}
// A sum relative to its largest, once another exceeds that: relative to the other, which adds 1.
// `factor` is e^(the largest so far - the other).
template <class V>
FASTVAE_INLINE V with_larger(V sum, V factor) {
  return fma(sum, factor, V(1));
}
// Of what was summed relative to `shift`.
template <class V>
FASTVAE_INLINE V log_of_sum(V shift, V sum) {
  return shift + log(sum);
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
