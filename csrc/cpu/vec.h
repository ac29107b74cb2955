// Vec<E>: sixteen numbers in as many registers as the instruction set needs.
//
// Sixteen whatever the instruction set and the type, so that sums over lanes have one order
// everywhere. Registers are the compiler's vector extension; intrinsics appear only where it has no
// word for an instruction: fused multiply-add and square root here, half precision in memory.h,
// widening multiply and transposition in words.h.
#pragma once

#include <type_traits>
#include <utility>

#include "../formulas/math.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastvae {
inline namespace FASTVAE_TARGET {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kLanes = 16;

template <class E, int Bytes>
struct RegisterOf {
  typedef E type __attribute__((vector_size(Bytes)));
};

// Calls `f` with 0 to N - 1. Written out by the front end: loops, of which every operation on
// vectors would be one, take the compiler most of its time to unroll.
template <int N, class F>
FASTVAE_INLINE void repeat(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { (f(I), ...); }(std::make_integer_sequence<int, N>());
}

template <class E, int N = kLanes>
struct Vec {
  using Register = typename RegisterOf<E, kRegisterBytes>::type;
  static constexpr int kSize = N;
  static constexpr int kPer = kRegisterBytes / sizeof(E);
  static constexpr int kCount = N / kPer;
  Register r[kCount];

  Vec() = default;
  FASTVAE_INLINE explicit Vec(E x) {  // the compiler leaves out - 0, not + 0
    repeat<kCount>([&](int i) __attribute__((always_inline)) { r[i] = x - Register{}; });
  }
};

// As many as two registers hold, at most. With one, the processor has too little to do while the
// next of a formula's hundred instructions waits for the last; with four, what is between does not
// fit into its registers (measured under AVX2 in float64: 1.6 times as long).
template <class E>
using ShortVec = Vec<E, Vec<E>::kCount == 1 ? kLanes : 2 * Vec<E>::kPer>;

template <int N>
struct Numeric<Vec<float, N>> {
  using Real = float;
  using Int = Vec<int32_t, N>;
};
template <int N>
struct Numeric<Vec<double, N>> {
  using Real = double;
  using Int = Vec<int64_t, N>;
};
template <class E>
struct MaskOf;
template <>
struct MaskOf<float> {
  using type = int32_t;
};
template <>
struct MaskOf<double> {
  using type = int64_t;
};
template <>
struct MaskOf<int32_t> {
  using type = int32_t;
};
template <>
struct MaskOf<int64_t> {
  using type = int64_t;
};
template <>
struct MaskOf<uint32_t> {
  using type = int32_t;
};
template <>
struct MaskOf<uint64_t> {
  using type = int64_t;
};
template <class E, int N = kLanes>
using Mask = Vec<typename MaskOf<E>::type, N>;

// Applies `f` register by register.
template <class To, class F, int N, class... From>
FASTVAE_INLINE Vec<To, N> each(F f, const Vec<From, N>&... a) {
  static_assert(((sizeof(From) == sizeof(To)) && ...));
  Vec<To, N> y;
  repeat<Vec<To, N>::kCount>([&](int i) __attribute__((always_inline)) {
    y.r[i] = (typename Vec<To, N>::Register)f(a.r[i]...);
  });
  return y;
}

// Integer sums wrap: the lanes are added as unsigned.
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator+(Vec<E, N> a, Vec<E, N> b) {
  return each<E>([](auto x, auto y) { return x + y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator-(Vec<E, N> a, Vec<E, N> b) {
  return each<E>([](auto x, auto y) { return x - y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator*(Vec<E, N> a, Vec<E, N> b) {
  return each<E>([](auto x, auto y) { return x * y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator/(Vec<E, N> a, Vec<E, N> b) {
  return each<E>([](auto x, auto y) { return x / y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator&(Vec<E, N> a, Vec<E, N> b) {
  return each<E>([](auto x, auto y) { return x & y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator|(Vec<E, N> a, Vec<E, N> b) {
  return each<E>([](auto x, auto y) { return x | y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator^(Vec<E, N> a, Vec<E, N> b) {
  return each<E>([](auto x, auto y) { return x ^ y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator<<(Vec<E, N> a, int n) {
  return each<E>([n](auto x) { return x << n; }, a);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> operator>>(Vec<E, N> a, int n) {
  return each<E>([n](auto x) { return x >> n; }, a);
}
template <class E, int N>
FASTVAE_INLINE Mask<E, N> operator<(Vec<E, N> a, Vec<E, N> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x < y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Mask<E, N> operator>(Vec<E, N> a, Vec<E, N> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x > y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Mask<E, N> operator>=(Vec<E, N> a, Vec<E, N> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x >= y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Mask<E, N> operator==(Vec<E, N> a, Vec<E, N> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x == y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Mask<E, N> operator!=(Vec<E, N> a, Vec<E, N> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x != y; }, a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> select(Mask<E, N> condition, Vec<E, N> a, Vec<E, N> b) {
  return each<E>([](auto c, auto x, auto y) { return c ? x : y; }, condition, a, b);
}

template <class M, int N>
FASTVAE_INLINE bool any(Vec<M, N> condition) {
  typename Vec<M, N>::Register some = condition.r[0];
  for (int i = 1; i < Vec<M, N>::kCount; ++i) some |= condition.r[i];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)some, (__m512i)some);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)some, (__m256i)some);
#else
  bool found = false;
  for (int k = 0; k < Vec<M, N>::kPer; ++k) found |= some[k] != 0;
  return found;
#endif
}

template <class To, class From, int N>
FASTVAE_INLINE Vec<To, N> reinterpret(Vec<From, N> a) {
  return each<To>([](auto x) { return x; }, a);
}
template <int N>
FASTVAE_INLINE Vec<int32_t, N> as_int(Vec<float, N> a) {
  return reinterpret<int32_t>(a);
}
template <int N>
FASTVAE_INLINE Vec<int64_t, N> as_int(Vec<double, N> a) {
  return reinterpret<int64_t>(a);
}
template <int N>
FASTVAE_INLINE Vec<float, N> as_real(Vec<int32_t, N> a) {
  return reinterpret<float>(a);
}
template <int N>
FASTVAE_INLINE Vec<double, N> as_real(Vec<int64_t, N> a) {
  return reinterpret<double>(a);
}
template <int N>
FASTVAE_INLINE Vec<float, N> to_real(Vec<int32_t, N> a) {
  return each<float>(
      [](auto x) { return __builtin_convertvector(x, typename Vec<float, N>::Register); }, a);
}
template <int N>
FASTVAE_INLINE Vec<double, N> to_real(Vec<int64_t, N> a) {
  return each<double>(
      [](auto x) { return __builtin_convertvector(x, typename Vec<double, N>::Register); }, a);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> wrap_add(Vec<E, N> a, Vec<E, N> b) {
  using U = Vec<std::make_unsigned_t<E>, N>;
  return each<E>([](auto x, auto y) { return (typename U::Register)x + (typename U::Register)y; },
                 a, b);
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> wrap_sub(Vec<E, N> a, Vec<E, N> b) {
  using U = Vec<std::make_unsigned_t<E>, N>;
  return each<E>([](auto x, auto y) { return (typename U::Register)x - (typename U::Register)y; },
                 a, b);
}

// ---- What the vector extension cannot say -------------------------------------------------------

#if !defined(__AVX512F__) && !defined(__FMA__) && !defined(__aarch64__)
// Without the instruction: a call each, since sixteen copies in every formula would take minutes to
// compile. The float product is exact in double; the sum is rounded to odd (Boldo & Melquiond
// 2008), after which rounding to float is the only rounding.
template <int N>
[[gnu::noinline]] inline Vec<float, N> fma_without_instruction(Vec<float, N> a, Vec<float, N> b,
                                                               Vec<float, N> c) {
  for (int l = 0; l < N; ++l) {
    const int i = l / Vec<float, N>::kPer, k = l % Vec<float, N>::kPer;
    const double product = double(a.r[i][k]) * b.r[i][k];
    const double addend = c.r[i][k];
    const double sum = product + addend;
    const double t = sum - product;
    const double error = (product - (sum - t)) + (addend - t);
    int64_t bits = as_int(sum);
    if (error != 0 && (bits & 1) == 0 && sum - sum == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
    c.r[i][k] = float(as_real(bits));
  }
  return c;
}
template <int N>
[[gnu::noinline]] inline Vec<double, N> fma_without_instruction(Vec<double, N> a, Vec<double, N> b,
                                                                Vec<double, N> c) {
  for (int i = 0; i < Vec<double, N>::kCount; ++i)
    for (int k = 0; k < Vec<double, N>::kPer; ++k)
      c.r[i][k] = __builtin_fma(a.r[i][k], b.r[i][k], c.r[i][k]);
  return c;
}
#endif

template <int N>
FASTVAE_INLINE Vec<float, N> fma(Vec<float, N> a, Vec<float, N> b, Vec<float, N> c) {
#if defined(__AVX512F__)
  return each<float>([](auto x, auto y, auto z) { return _mm512_fmadd_ps(x, y, z); }, a, b, c);
#elif defined(__FMA__)
  return each<float>([](auto x, auto y, auto z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
#elif defined(__aarch64__)
  return each<float>([](auto x, auto y, auto z) { return vfmaq_f32(z, x, y); }, a, b, c);
#else
  return fma_without_instruction(a, b, c);
#endif
}

template <int N>
FASTVAE_INLINE Vec<double, N> fma(Vec<double, N> a, Vec<double, N> b, Vec<double, N> c) {
#if defined(__AVX512F__)
  return each<double>([](auto x, auto y, auto z) { return _mm512_fmadd_pd(x, y, z); }, a, b, c);
#elif defined(__FMA__)
  return each<double>([](auto x, auto y, auto z) { return _mm256_fmadd_pd(x, y, z); }, a, b, c);
#elif defined(__aarch64__)
  return each<double>([](auto x, auto y, auto z) { return vfmaq_f64(z, x, y); }, a, b, c);
#else
  return fma_without_instruction(a, b, c);
#endif
}

template <int N>
FASTVAE_INLINE Vec<float, N> sqrt(Vec<float, N> a) {
#if defined(__AVX512F__)
  return each<float>([](auto x) { return _mm512_sqrt_ps(x); }, a);
#elif defined(__AVX2__)
  return each<float>([](auto x) { return _mm256_sqrt_ps(x); }, a);
#elif defined(__SSE2__)
  return each<float>([](auto x) { return _mm_sqrt_ps(x); }, a);
#elif defined(__aarch64__)
  return each<float>([](auto x) { return vsqrtq_f32(x); }, a);
#else
  for (int i = 0; i < Vec<float, N>::kCount; ++i)
    for (int k = 0; k < Vec<float, N>::kPer; ++k) a.r[i][k] = __builtin_sqrtf(a.r[i][k]);
  return a;
#endif
}

template <int N>
FASTVAE_INLINE Vec<double, N> sqrt(Vec<double, N> a) {
#if defined(__AVX512F__)
  return each<double>([](auto x) { return _mm512_sqrt_pd(x); }, a);
#elif defined(__AVX2__)
  return each<double>([](auto x) { return _mm256_sqrt_pd(x); }, a);
#elif defined(__SSE2__)
  return each<double>([](auto x) { return _mm_sqrt_pd(x); }, a);
#elif defined(__aarch64__)
  return each<double>([](auto x) { return vsqrtq_f64(x); }, a);
#else
  for (int i = 0; i < Vec<double, N>::kCount; ++i)
    for (int k = 0; k < Vec<double, N>::kPer; ++k) a.r[i][k] = __builtin_sqrt(a.r[i][k]);
  return a;
#endif
}

// From one type to another; in registers, where a copy through memory would keep a sum there.
template <class E>
FASTVAE_INLINE Vec<E> convert(Vec<E> a, Vec<E>*) {
  return a;
}
FASTVAE_INLINE Vec<double> convert(Vec<float> a, Vec<double>*) {
  Vec<double> y;
#if defined(__AVX512F__)
  y.r[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(a.r[0]));
  y.r[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.r[0], 1));
#elif defined(__AVX2__)
  repeat<2>([&](int i) __attribute__((always_inline)) {
    y.r[2 * i] = _mm256_cvtps_pd(_mm256_castps256_ps128(a.r[i]));
    y.r[2 * i + 1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a.r[i], 1));
  });
#else
  for (int l = 0; l < kLanes; ++l)
    y.r[l / Vec<double>::kPer][l % Vec<double>::kPer] =
        a.r[l / Vec<float>::kPer][l % Vec<float>::kPer];
#endif
  return y;
}
FASTVAE_INLINE Vec<float> convert(Vec<double> a, Vec<float>*) {
  Vec<float> y;
#if defined(__AVX512F__)
  const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(a.r[0]));
  y.r[0] = _mm512_insertf32x8(low, _mm512_cvtpd_ps(a.r[1]), 1);
#elif defined(__AVX2__)
  repeat<2>([&](int i) __attribute__((always_inline)) {
    y.r[i] = _mm256_set_m128(_mm256_cvtpd_ps(a.r[2 * i + 1]), _mm256_cvtpd_ps(a.r[2 * i]));
  });
#else
  for (int l = 0; l < kLanes; ++l)
    y.r[l / Vec<float>::kPer][l % Vec<float>::kPer] =
        float(a.r[l / Vec<double>::kPer][l % Vec<double>::kPer]);
#endif
  return y;
}

// The compiler makes two instructions of `bound < x ? bound : x`.
#if defined(__AVX512F__)
template <int N>
FASTVAE_INLINE Vec<float, N> at_most(Vec<float, N> bound, Vec<float, N> x) {
  return each<float>([](auto b, auto y) { return _mm512_min_ps(b, y); }, bound, x);
}
template <int N>
FASTVAE_INLINE Vec<float, N> at_least(Vec<float, N> bound, Vec<float, N> x) {
  return each<float>([](auto b, auto y) { return _mm512_max_ps(b, y); }, bound, x);
}
#elif defined(__AVX2__)
template <int N>
FASTVAE_INLINE Vec<float, N> at_most(Vec<float, N> bound, Vec<float, N> x) {
  return each<float>([](auto b, auto y) { return _mm256_min_ps(b, y); }, bound, x);
}
template <int N>
FASTVAE_INLINE Vec<float, N> at_least(Vec<float, N> bound, Vec<float, N> x) {
  return each<float>([](auto b, auto y) { return _mm256_max_ps(b, y); }, bound, x);
}
#else
template <int N>
FASTVAE_INLINE Vec<float, N> at_most(Vec<float, N> bound, Vec<float, N> x) {
  return select(bound < x, bound, x);
}
template <int N>
FASTVAE_INLINE Vec<float, N> at_least(Vec<float, N> bound, Vec<float, N> x) {
  return select(bound > x, bound, x);
}
#endif
template <int N>
FASTVAE_INLINE Vec<double, N> at_most(Vec<double, N> bound, Vec<double, N> x) {
  return select(bound < x, bound, x);
}
template <int N>
FASTVAE_INLINE Vec<double, N> at_least(Vec<double, N> bound, Vec<double, N> x) {
  return select(bound > x, bound, x);
}

#if defined(__AVX512F__)
template <int N>
struct PowerOfTwo<Vec<float, N>> {
  Vec<float, N> n;

  FASTVAE_INLINE explicit PowerOfTwo(Vec<float, N> shifted)
      : n(shifted - Vec<float, N>(Constants<float>::round_magic)) {}
  FASTVAE_INLINE Vec<float, N> times(Vec<float, N> x) const {
    return each<float>([](auto a, auto b) { return _mm512_scalef_ps(a, b); }, x, n);
  }
};
template <int N>
FASTVAE_INLINE Vec<float, N> times_power_of_two(Vec<float, N> x, Vec<float, N> shifted) {
  return PowerOfTwo<Vec<float, N>>(shifted).times(x);
}
#endif

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
