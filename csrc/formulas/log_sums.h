// The logarithm of a sum of exponentials, relative to the largest, over one number or a vector, on
// host and device.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

constexpr double kLog2e = 1.4426950408889634074;

// (2^-g - 1) / g, |g| <= 1/2: minimax coefficients as those of math.h, relative error of 2^-g 6e-9
// (float) and 3e-18 (double).
template <class V>
FASTVAE_INLINE V power_polynomial(V g) {
  if constexpr (sizeof(Real<V>) == sizeof(float)) {
    const float c[] = {-0x1.62e432p-1f, 0x1.ebfbe6p-3f,   -0x1.c6adc4p-5f,
                       0x1.3b222ep-7f,  -0x1.5fa782p-10f, 0x1.4b0c3cp-13f};
    return polynomial(g, c);
  } else {
    const double c[] = {-0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58ep-3,   -0x1.c6b08d704a198p-5,
                        0x1.3b2ab6fba51d4p-7,   -0x1.5d87fe788ac2ep-10, 0x1.430912f73cb87p-13,
                        -0x1.ffcbfc93c3b93p-17, 0x1.62c027ad703bbp-20,  -0x1.b525c13e3b0ecp-24,
                        0x1.e4b95b8c11f60p-28,  -0x1.e3e89e8c810a5p-32, 0x1.e4350363422d0p-36,
                        -0x1.571f12ce8870fp-37};
    return short_polynomial(g, g * g, c);
  }
}

// 2^-q for q >= 0, to 1.0 (double: 1.5) units in the last place: what a component weighs against
// one of weight 1. 0 below 10^-26 (in double 10^-130), which no sum notices: numbers near the
// smallest would make every product with them take a hundred times as long.
template <class V>
FASTVAE_INLINE V weight(V q) {
  using C = Constants<Real<V>>;
  constexpr bool kDouble = sizeof(Real<V>) == sizeof(double);
  const V shifted = V(C::round_magic) - q;
  const V g = q + (shifted - V(C::round_magic));  // -q = n - g
  const V power = fma(power_polynomial(g), g, V(1));
  return select(q >= V(Real<V>(kDouble ? 430 : 86)), V(0), times_power_of_two(power, shifted));
}

#ifdef __CUDA_ARCH__
// By the instruction that GPUs have for it, 2 units off at the most (PTX ISA, ex2).
FASTVAE_INLINE float weight(float q) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-q));
  return power;
}
#endif

// log - total in powers of 1/2. Taken in the type of the logarithms, and narrowed then.
template <class V>
FASTVAE_INLINE V halvings(V log, V total) {
  return (total - log) * V(Real<V>(kLog2e));
}
// 2^-q for a q that is below 0 only by its rounding.
template <class V>
FASTVAE_INLINE V weight_of_all(V q) {
  return weight(at_least(V(0), q));
}
// e^(log - total), for a `total` that is not below.
template <class V>
FASTVAE_INLINE V share(V log, V total) {
  return weight(halvings(log, total));
}
// The same for a total that is below only by its rounding.
template <class V>
FASTVAE_INLINE V share_of_all(V log, V total) {
  return weight_of_all(halvings(log, total));
}

// The same of logarithms that have more digits than it needs.
template <class T>
FASTVAE_INLINE T narrow_share_of_all(double log, double total) {
  return weight_of_all(T(halvings(log, total)));
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
