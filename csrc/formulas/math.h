// Elementary functions over one number or a vector of numbers, on host and device.
//
// In the words of numbers.h and two more that cpu/vec.h may say better: PowerOfTwo,
// times_power_of_two.
//
// Largest errors, in units in the last place, over the whole domain unless said
// (tests/test_math.py):
//   function          float  double   domain
//   exp               1.0    1.0      all; 0 and inf where the result leaves the range
//   expm1             1.5    2.5      all
//   e^t - 1 - t       8      10       all; relative error holds down to t = 0
//   e^t and e^-t      2.5    2.5      where both are normal
//   log               1.0    1.0      all; NaN below 0
//   log1p             1.5    1.0      0 ... 1
//   v - ln(1 + v)     8      10       v > -1, where v and 1 + v are exact
//   ln(1 + v)         1.5    1.0      the same, of ratios that are normal
//   softplus          2.0    2.0      all
//   sigmoid           2.0    2.0      all
#pragma once

#include "numbers.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// ---- Constants by precision ---------------------------------------------------------------------
// Minimax coefficients were found by the Remez exchange in 60 digits, relative error 3e-9 (float)
// and 3e-20 (double) for the exponential, 6e-9 for the float logarithm. The double logarithm takes
// fdlibm's e_log.c.

template <class R>
struct Constants;

template <>
struct Constants<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int exponent_bias = 127;
  static constexpr float round_magic = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2_hi = 0x1.62ep-1f;  // 12 bits: n * ln2_hi is exact
  static constexpr float ln2_lo = 0x1.0bfbe8p-15f;
  static constexpr float exp_max = 88.73f;   // overflows; 2^n with n = 128 does so in half
  static constexpr float exp_min = -105.0f;  // e^-105 is 0
  static constexpr float sqrt_half = 0x1.6a09e6p-1f;
  static constexpr float sqrt_two_minus_one = 0x1.a8279ap-2f;
  static constexpr float smallest_normal = 0x1p-126f;
  static constexpr float infinity = __builtin_inff();
  static constexpr float nan = __builtin_nanf("");
};

template <>
struct Constants<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int exponent_bias = 1023;
  static constexpr double round_magic = 0x1.8p52;
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2_hi = 0x1.62e42feep-1;
  static constexpr double ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double exp_max = 709.79;
  static constexpr double exp_min = -746.0;
  static constexpr double sqrt_half = 0x1.6a09e667f3bcdp-1;
  static constexpr double sqrt_two_minus_one = 0x1.a827999fcef32p-2;
  static constexpr double smallest_normal = 0x1p-1022;
  static constexpr double infinity = __builtin_inf();
  static constexpr double nan = __builtin_nan("");
};

// P with e^r = 1 + r + r^2 P(r), |r| <= ln(2)/2.
template <class V>
FASTVAE_INLINE V exp_polynomial(V r, V r2) {
  if constexpr (sizeof(Real<V>) == sizeof(float)) {
    const float c[] = {0x1p-1f,        0x1.555556p-3f,  0x1.5554eap-5f,
                       0x1.11114cp-7f, 0x1.6d42dap-10f, 0x1.a072c4p-13f};
    return short_polynomial(r, r2, c);
  } else {
    const double c[] = {0x1p-1,
                        0x1.5555555555555p-3,
                        0x1.5555555555557p-5,
                        0x1.111111111110dp-7,
                        0x1.6c16c16c15a77p-10,
                        0x1.a01a01a01cdefp-13,
                        0x1.a01a01a9e4290p-16,
                        0x1.71de3a4a37ed5p-19,
                        0x1.27e4d426452f2p-22,
                        0x1.ae6470f34945ep-26,
                        0x1.1f7f12095bd7dp-29,
                        0x1.61580cd2cf5c7p-33};
    return short_polynomial(r, r2, c);
  }
}

// a * b, and 0 where a is, even if b has overflowed.
template <class V>
FASTVAE_INLINE V safe_product(V a, V b) {
  const auto lost = (a == V(0)) & (b == V(Constants<Real<V>>::infinity));
  return select(lost, V(0), a * b);
}

// ---- Exponential and its relatives --------------------------------------------------------------

// e^t and what is near to it. Each is accurate in the relative sense; what a caller does not use
// costs nothing.
template <class V>
struct Exp {
  V exp;         // e^t
  V half_expm1;  // (e^t - 1) / 2
  V expm1;       // e^t - 1
  V tail;        // e^t - 1 - t >= 0
};

// 2^n, where that is a normal number. Bits of round_magic in `n` are pushed out.
template <class V>
FASTVAE_INLINE V power_of_two(Int<V> n) {
  using C = Constants<Real<V>>;
  return as_real((n + Int<V>(C::exponent_bias)) << C::mantissa_bits);
}

// 2^n as a factor, for the n that a shifted sum n + round_magic holds. Two halves, so that nothing
// over- or underflows where the product does not; instruction sets that scale by a power have it in
// one (cpu/vec.h).
template <class V>
struct PowerOfTwo {
  V half, rest;

  FASTVAE_INLINE explicit PowerOfTwo(V shifted) {
    const Int<V> n = as_int(shifted), n_half = n >> 1;
    half = power_of_two<V>(n_half);
    rest = power_of_two<V>(wrap_sub(n, n_half));
  }
  FASTVAE_INLINE V times(V x) const { return x * half * rest; }
};

// x 2^n where 2^n is a normal number.
template <class V>
FASTVAE_INLINE V times_power_of_two(V x, V shifted) {
  return x * power_of_two<V>(as_int(shifted));
}

// t = n ln 2 + r with |r| <= ln(2)/2.
template <class V>
struct Reduced {
  V shifted, n, r;

  FASTVAE_INLINE explicit Reduced(V t) {
    using C = Constants<Real<V>>;
    shifted = fma(t, V(C::log2e), V(C::round_magic));
    n = shifted - V(C::round_magic);
    r = fma(n, V(-C::ln2_lo), fma(n, V(-C::ln2_hi), t));
  }
};

template <class V>
FASTVAE_INLINE Exp<V> exp(V t) {
  using C = Constants<Real<V>>;
  // Beyond the bounds nothing changes, and infinities stay out of the subtraction below.
  const V upper = at_most(V(C::exp_max), t);
  const auto [shifted, n, r] = Reduced<V>(at_least(V(C::exp_min), upper));
  const V r2 = r * r;
  const V p = exp_polynomial(r, r2);
  const V expm1 = fma(r2, p, r);  // e^r - 1
  const PowerOfTwo<V> power(shifted);
  const V half_power = power.times(V(0.5));  // 2^n itself may be too large
  Exp<V> result;
  result.exp = power.times(V(1) + expm1);
  result.half_expm1 = fma(half_power, expm1, half_power - V(0.5));
  // Where n = 0 there is nothing to scale, and the tail is r^2 P without a subtraction.
  const auto unscaled = n == V(0);
  result.expm1 = select(unscaled, expm1, result.half_expm1 + result.half_expm1);
  result.tail = select(unscaled, r2 * p, result.expm1 - upper);
  return result;
}

// Of cosh r and sinh(r) / r, by r^2. For |r| <= ln(2)/2 the next term is below an eighth of a unit
// in the last place.
template <class R>
struct HyperbolicSeries {
  static constexpr int kTerms = sizeof(R) == sizeof(float) ? 4 : 8;
  R cosh[kTerms] = {1}, sinh[kTerms] = {1};

  FASTVAE_INLINE constexpr HyperbolicSeries() {
    for (int i = 1; i < kTerms; ++i) {
      cosh[i] = cosh[i - 1] / R((2 * i - 1) * (2 * i));
      sinh[i] = sinh[i - 1] / R((2 * i) * (2 * i + 1));
    }
  }
};

// e^t and e^-t, by the even and the odd part of e^r.
template <class V>
struct ExpBothWays {
  V up, down;
};
template <class V>
FASTVAE_INLINE ExpBothWays<V> exp_both_ways(V t) {
  constexpr HyperbolicSeries<Real<V>> series;
  const auto [shifted, n, r] = Reduced<V>(t);
  const V r2 = r * r;
  const V cosh = polynomial(r2, series.cosh), sinh = r * polynomial(r2, series.sinh);
  return {times_power_of_two(cosh + sinh, shifted),
          times_power_of_two(cosh - sinh, V(Constants<Real<V>>::round_magic) - n)};
}

// ---- Logarithm ----------------------------------------------------------------------------------

// ln((1 + f) 2^e) - f without the larger part of e ln 2, for f in [sqrt(1/2) - 1, sqrt(2) - 1].
template <class V>
FASTVAE_INLINE V log_rest(V f, V e) {
  using C = Constants<Real<V>>;
  if constexpr (sizeof(Real<V>) == sizeof(float)) {
    const float c[] = {0x1.555554p-2f, -0x1.000226p-2f, 0x1.99a008p-3f, -0x1.547244p-3f,
                       0x1.22da1ap-3f, -0x1.0d8546p-3f, 0x1.055b7ep-3f, -0x1.38b596p-4f};
    const V f2 = f * f;
    V y = f2 * f * short_polynomial(f, f2, c);
    y = fma(e, V(C::ln2_lo), y);
    return fma(f2, V(-0.5f), y);
  } else {
    const double c[] = {6.666666666666735130e-01, 3.999999999940941908e-01,
                        2.857142874366239149e-01, 2.222219843214978396e-01,
                        1.818357216161805012e-01, 1.531383769920937332e-01,
                        1.479819860511658591e-01};
    const V s = f / (V(2.0) + f);
    const V s2 = s * s;
    const V half_f2 = V(0.5) * f * f;
    const V correction = s * (half_f2 + s2 * polynomial(s2, c));
    return fma(e, V(C::ln2_lo), correction) - half_f2;
  }
}
// ln((1 + f) 2^e)
template <class V>
FASTVAE_INLINE V log_of_parts(V f, V e) {
  return fma(e, V(Constants<Real<V>>::ln2_hi), f + log_rest(f, e));
}

// x = m 2^e with m in [sqrt(1/2), sqrt(2)), for normal positive x.
template <class V>
struct Split {
  V mantissa;
  Int<V> exponent;
};

template <class V>
FASTVAE_INLINE Split<V> split(V x) {
  using C = Constants<Real<V>>;
  using I = Int<V>;
  const I exponent = wrap_sub(as_int(x), as_int(V(C::sqrt_half))) >> C::mantissa_bits;
  return {as_real(wrap_sub(as_int(x), exponent << C::mantissa_bits)), exponent};
}

template <class V>
FASTVAE_INLINE V log(V x) {
  using C = Constants<Real<V>>;
  const auto tiny = x < V(C::smallest_normal);
  V normal = x, shift(0);
  if (any(tiny)) {
    normal = select(tiny, x * V(Real<V>(int64_t(1) << C::mantissa_bits)), x);
    shift = select(tiny, V(C::mantissa_bits), V(0));
  }
  const Split<V> parts = split(normal);
  V y = log_of_parts(parts.mantissa - V(1), to_real(parts.exponent) - shift);
  const auto special = tiny | (x == V(C::infinity)) | (x != x);
  if (!any(special)) return y;
  y = select(x == V(C::infinity), x, y);
  y = select(x == V(0), V(-C::infinity), y);
  return select((x < V(0)) | (x != x), V(C::nan), y);
}

// For normal positive x.
template <class V>
FASTVAE_INLINE V log_of_normal(V x) {
  const Split<V> parts = split(x);
  return log_of_parts(parts.mantissa - V(1), to_real(parts.exponent));
}

// The sum of the logarithms of a few normal positive numbers: of the product of what are their
// digits, which is near 1.
template <class V, int N>
FASTVAE_INLINE V log_of_product(const V (&x)[N]) {
  Split<V> all = split(x[0]);
  FASTVAE_UNROLL
  for (int i = 1; i < N; ++i) {
    const Split<V> parts = split(x[i]);
    all.mantissa = all.mantissa * parts.mantissa;
    all.exponent = wrap_add(all.exponent, parts.exponent);
  }
  const Split<V> parts = split(all.mantissa);
  return log_of_parts(parts.mantissa - V(1), to_real(wrap_add(all.exponent, parts.exponent)));
}

// v - ln(1 + v) >= 0, accurate in the relative sense near v = 0 too; `ratio` is 1 + v. Infinite at
// both ends. Where v is near -1, `ratio` may be any number: v - ln(ratio).
template <class V>
FASTVAE_INLINE V log_deviance(V v, V ratio) {
  using C = Constants<Real<V>>;
  const Split<V> parts = split(ratio);
  const V e = to_real(parts.exponent);
  const auto near = (e == V(0)) & (v > V(-0.5));
  const V f = select(near, v, parts.mantissa - V(1)), rest = log_rest(f, e);
  const V y = select(near, V(0) - rest, v - fma(e, V(C::ln2_hi), f + rest));
  const auto special = (ratio < V(C::smallest_normal)) | (ratio == V(C::infinity));
  if (!any(special)) return y;
  return select(special, v - at_most(V(C::exp_max), log(ratio)), y);
}

// ln(1 + v), accurate in the relative sense near v = 0 too; `ratio` is 1 + v, normal and finite.
template <class V>
FASTVAE_INLINE V log_of_ratio(V v, V ratio) {
  const Split<V> parts = split(ratio);
  const V e = to_real(parts.exponent);
  return log_of_parts(select(e == V(0), v, parts.mantissa - V(1)), e);
}

// ln(1 + u) for 0 <= u <= 1, which is (1 + f) 2^e for an f that takes no sum with a small u.
template <class V>
FASTVAE_INLINE V log1p(V u) {
  const auto large = u > V(Constants<Real<V>>::sqrt_two_minus_one);
  return log_of_parts(select(large, fma(V(0.5), u, V(-0.5)), u), select(large, V(1), V(0)));
}

// ---- Softplus, sigmoid, tanh
// -----------------------------------------------------------------------

template <class V>
struct Softplus {
  V value;         // ln(1 + e^t)
  V tail;          // ln(1 + e^-|t|), by which that is above max(t, 0)
  V sigmoid;       // 1 / (1 + e^-t), its derivative
  V tail_sigmoid;  // 1 / (1 + e^|t|)
};

template <class V>
FASTVAE_INLINE Softplus<V> softplus(V t) {
  const V u = exp(at_most(V(0) - t, t)).exp;  // e^-|t|
  const V tail = log1p(u), sum = V(1) + u;
  return {at_least(V(0), t) + tail, tail, select(t < V(0), u, V(1)) / sum, u / sum};
}

template <class V>
struct Ratio {
  V above, below;
};
// tanh, still to be divided: by 1 to 2.
template <class V>
FASTVAE_INLINE Ratio<V> tanh_as_ratio(V t) {
  const V e = exp(V(-2) * magnitude(t)).expm1;
  return {select(t < V(0), e, V(0) - e), V(2) + e};
}
template <class V>
FASTVAE_INLINE V tanh(V t) {
  const Ratio<V> y = tanh_as_ratio(t);
  return y.above / y.below;
}

// ---- sin and cos of pi x, |x| <= 1/4 ------------------------------------------------------------
// Minimax in x^2, relative error 3e-9 and 6e-11 before rounding; float only (the noise is float32).

template <class V>
FASTVAE_INLINE V sinpi_quarter(V x) {
  const float c[] = {0x1.921fb6p+1f, -0x1.4abbbap+2f, 0x1.465e92p+1f, -0x1.2d9302p-1f};
  return x * polynomial(x * x, c);
}

template <class V>
FASTVAE_INLINE V cospi_quarter(V x) {
  const float c[] = {1.0f, -0x1.3bd3ccp+2f, 0x1.03c1dap+2f, -0x1.55c4eap+0f, 0x1.d99f54p-3f};
  return polynomial(x * x, c);
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
