// What formulas are written in: the words that one number and a vector of numbers share, on host
// and device. Those for `float` and `double` are here, those for `Vec<E>` in cpu/vec.h:
// + - * /, comparisons, fma, sqrt, select, any, at_most, at_least, as_int, as_real, to_real,
// wrap_add, wrap_sub.
//
// Every multiply-add is spelled `fma` and compilers must not contract others (-ffp-contract=off,
// --fmad=false), so all instruction sets and devices give the same float32 bits.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTVAE_INLINE __host__ __device__ __forceinline__
#define FASTVAE_UNROLL _Pragma("unroll")
#else
#define FASTVAE_INLINE inline __attribute__((always_inline))
#define FASTVAE_UNROLL _Pragma("GCC unroll 16")
#endif

// Code compiled for a higher instruction set must not share a symbol with code compiled for a lower
// one: the linker would keep either. So everything here lives in a namespace of its target.
#ifndef FASTVAE_TARGET
#define FASTVAE_TARGET generic
#endif

namespace fastvae {
inline namespace FASTVAE_TARGET {

template <class V>
struct Numeric;
template <>
struct Numeric<float> {
  using Real = float;
  using Int = int32_t;
};
template <>
struct Numeric<double> {
  using Real = double;
  using Int = int64_t;
};
template <class V>
using Real = typename Numeric<V>::Real;
template <class V>
using Int = typename Numeric<V>::Int;

FASTVAE_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTVAE_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

#ifdef __CUDA_ARCH__
FASTVAE_INLINE float sqrt(float a) { return __fsqrt_rn(a); }
FASTVAE_INLINE double sqrt(double a) { return __dsqrt_rn(a); }
// For 2^-100 < a < 2^100, correctly rounded too: what __fsqrt_rn does for such numbers, after it
// has found that they are such.
FASTVAE_INLINE float sqrt_of_normal(float a) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
  const float root = a * inverse;
  return fma(fma(-root, root, a), 0.5f * inverse, root);
}
#else
FASTVAE_INLINE float sqrt(float a) { return __builtin_sqrtf(a); }
FASTVAE_INLINE double sqrt(double a) { return __builtin_sqrt(a); }
template <class V>
FASTVAE_INLINE V sqrt_of_normal(V a) {
  return sqrt(a);
}
#endif

template <class T>
FASTVAE_INLINE T select(bool condition, T a, T b) {
  return condition ? a : b;
}

// Whether a condition holds in any lane: what only some numbers need can be left out where none do.
FASTVAE_INLINE bool any(bool condition) { return condition; }

// The smaller, the larger of two; a NaN in `x` passes.
template <class T>
FASTVAE_INLINE T at_most(T bound, T x) {
  return bound < x ? bound : x;
}
template <class T>
FASTVAE_INLINE T at_least(T bound, T x) {
  return bound > x ? bound : x;
}

template <class To, class From>
FASTVAE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
FASTVAE_INLINE int32_t as_int(float a) { return bit_cast<int32_t>(a); }
FASTVAE_INLINE int64_t as_int(double a) { return bit_cast<int64_t>(a); }
FASTVAE_INLINE float as_real(int32_t a) { return bit_cast<float>(a); }
FASTVAE_INLINE double as_real(int64_t a) { return bit_cast<double>(a); }
FASTVAE_INLINE float to_real(int32_t a) { return static_cast<float>(a); }
FASTVAE_INLINE double to_real(int64_t a) { return static_cast<double>(a); }
FASTVAE_INLINE int32_t wrap_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
FASTVAE_INLINE int64_t wrap_add(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
FASTVAE_INLINE int32_t wrap_sub(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
}
FASTVAE_INLINE int64_t wrap_sub(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

template <class V>
FASTVAE_INLINE V magnitude(V x) {
  return at_least(V(0) - x, x);
}

// c[0] + c[1] x + ... by Horner's rule.
template <class V, int N>
FASTVAE_INLINE V polynomial(V x, const Real<V> (&c)[N]) {
  V y(c[N - 1]);
  FASTVAE_UNROLL
  for (int i = N - 2; i >= 0; --i) y = fma(y, x, V(c[i]));
  return y;
}

// The same by Estrin's scheme, for x2 = x^2: pairs c[i] + c[i+1] x are the coefficients of a
// polynomial in x^2. A multiplication or two more, in a chain half as long, which is what a
// processor waits for where nothing else is to be done.
template <class V, int N>
FASTVAE_INLINE V estrin(V x, V x2, const V (&c)[N]) {
  V pairs[(N + 1) / 2];
  FASTVAE_UNROLL
  for (int i = 0; i < N / 2; ++i) pairs[i] = fma(c[2 * i + 1], x, c[2 * i]);
  if constexpr (N % 2) pairs[N / 2] = c[N - 1];
  if constexpr (N <= 2)
    return pairs[0];
  else
    return estrin(x2, x2 * x2, pairs);
}
template <class V, int N>
FASTVAE_INLINE V short_polynomial(V x, V x2, const Real<V> (&c)[N]) {
  V coefficients[N];
  FASTVAE_UNROLL
  for (int i = 0; i < N; ++i) coefficients[i] = V(c[i]);
  return estrin(x, x2, coefficients);
}

// Reciprocals by one division, which takes as long as eighteen multiplications. The product of all
// must be normal.
template <class V, int N>
FASTVAE_INLINE void reciprocals(const V (&x)[N], V (&to)[N]) {
  V product[N] = {x[0]};
  FASTVAE_UNROLL
  for (int i = 1; i < N; ++i) product[i] = product[i - 1] * x[i];
  V rest = V(1) / product[N - 1];
  FASTVAE_UNROLL
  for (int i = N - 1; i > 0; --i) {
    to[i] = rest * product[i - 1];
    rest = rest * x[i];
  }
  to[0] = rest;
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
