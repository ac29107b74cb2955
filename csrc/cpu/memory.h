// Vectors to and from memory: types converted on the way, tails in part, lanes summed in a fixed
// order.
#pragma once

#include "../plan.h"
#include "vec.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

using HalfRegister = RegisterOf<uint16_t, kRegisterBytes / 2>::type;

// Register by register: gcc copies a larger struct in 16-byte pieces, and reading those back whole
// stalls on store forwarding (measured: KL under AVX2 took five times as long).
template <int N = kLanes, class E>
FASTVAE_INLINE Vec<E, N> load_same(const E* p) {
  Vec<E, N> y;
  repeat<Vec<E, N>::kCount>([&](int i) __attribute__((always_inline)) {
    memcpy(&y.r[i], p + i * Vec<E, N>::kPer, kRegisterBytes);
  });
  return y;
}
template <class E, int N>
FASTVAE_INLINE void store_same(E* p, Vec<E, N> a) {
  repeat<Vec<E, N>::kCount>([&](int i) __attribute__((always_inline)) {
    memcpy(p + i * Vec<E, N>::kPer, &a.r[i], kRegisterBytes);
  });
}
template <class E, int N>
FASTVAE_INLINE Vec<E, N> load(const E* p, Vec<E, N>*) {
  return load_same<N>(p);
}
template <int N>
FASTVAE_INLINE Vec<double, N> load(const float* p, Vec<double, N>*) {
  using Narrow = RegisterOf<float, kRegisterBytes / 2>::type;
  using To = Vec<double, N>;
  To y;
  repeat<To::kCount>([&](int i) __attribute__((always_inline)) {
    Narrow x;
    memcpy(&x, p + i * To::kPer, sizeof(x));
    y.r[i] = __builtin_convertvector(x, typename To::Register);
  });
  return y;
}

// Of __builtin_convertvector between these two gcc 12 makes four instructions instead of AVX-512's
// one.
FASTVAE_INLINE Vec<int32_t> load_words(const uint16_t* p) {
  Vec<int32_t> y;
#if defined(__AVX512F__)
  y.r[0] = (Vec<int32_t>::Register)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#else
  for (int i = 0; i < Vec<int32_t>::kCount; ++i) {
    HalfRegister x;
    memcpy(&x, p + i * Vec<int32_t>::kPer, sizeof(x));
    y.r[i] = __builtin_convertvector(x, Vec<int32_t>::Register);
  }
#endif
  return y;
}
// The lower halves; the upper ones are 0.
FASTVAE_INLINE void store_words(uint16_t* p, Vec<uint32_t> a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)a.r[0]));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)a.r[0], (__m256i)a.r[1]);
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
#else
  for (int i = 0; i < Vec<uint32_t>::kCount; ++i) {
    const HalfRegister x = __builtin_convertvector(a.r[i], HalfRegister);
    memcpy(p + i * Vec<uint32_t>::kPer, &x, sizeof(x));
  }
#endif
}

FASTVAE_INLINE void store_upper_words(uint16_t* p, Vec<uint32_t> a) {
#if defined(__AVX512F__)
  alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                     17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i packed = _mm512_permutexvar_epi16(_mm512_load_si512(upper), (__m512i)a.r[0]);
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(packed));
#else
  store_words(p, a >> 16);
#endif
}

FASTVAE_INLINE Vec<float> load(const bfloat16* p, Vec<float>*) {
  return as_real(load_words(&p->bits) << 16);
}
FASTVAE_INLINE Vec<float> load(const float16* p, Vec<float>*) {
#if defined(__AVX512F__)
  __m256i x;
  memcpy(&x, p, sizeof(x));
  Vec<float> y;
  y.r[0] = _mm512_cvtph_ps(x);
  return y;
#elif defined(__F16C__)
  Vec<float> y;
  for (int i = 0; i < 2; ++i) y.r[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i));
  return y;
#else
  // Shifted into place, the exponent is short by 127 - 15 = 112; Inf and NaN by another 112.
  using I = Vec<int32_t>;
  const I half = load_words(&p->bits);
  const I magnitude = (half & I(0x7fff)) << 13;
  const Vec<float> scaled = as_real(magnitude) * Vec<float>(0x1p112f);
  const I special = magnitude | I(0x7f800000);
  const I bits = select(magnitude > I((0x1f << 23) - 1), special, as_int(scaled));
  return as_real(bits | ((half & I(0x8000)) << 16));
#endif
}

template <class E, int N>
FASTVAE_INLINE void store(E* p, Vec<E, N> a) {
  store_same(p, a);
}
FASTVAE_INLINE void store(bfloat16* p, Vec<float> a) {  // to nearest, ties to even
  using U = Vec<uint32_t>;
  const U bits = reinterpret<uint32_t>(a);
  const U last_bit = (bits << 15) >> 31;  // of what is kept; a mask would be loaded each time
  store_upper_words(&p->bits, select(a != a, U(~0u), bits + U(0x7fff) + last_bit));
}
FASTVAE_INLINE void store(float16* p, Vec<float> a) {
#if defined(__AVX512F__)
  const __m256i x = _mm512_cvtps_ph(a.r[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &x, sizeof(x));
#elif defined(__F16C__)
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128((__m128i*)p + i,
                     _mm256_cvtps_ph(a.r[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  // Round in float arithmetic: adding 2^(e+13) leaves just the bits that a half keeps (F. Giesen,
  // "float->half variants", 2012). Values of 65520 and more become infinite.
  using I = Vec<int32_t>;
  const I magnitude = as_int(a) & I(0x7fffffff);
  const I even = (magnitude >> 13) & I(1);
  const I normal = (magnitude + I(((15 - 127) << 23) + 0xfff) + even) >> 13;
  const I subnormal = as_int(as_real(magnitude) + Vec<float>(0.5f)) - I(126 << 23);
  I bits = select(magnitude < I(113 << 23), subnormal, normal);
  bits = select(magnitude > I((143 << 23) - 1), I(0x7c00), bits);
  bits = select(magnitude > I(0x7f800000), I(0x7e00), bits);
  store_words(&p->bits, reinterpret<uint32_t>(bits | ((as_int(a) >> 16) & I(0x8000))));
#endif
}

// The first `n` numbers of a vector that is not whole; the other lanes are 0.
template <class E, int N, class T>
FASTVAE_INLINE Vec<E, N> load_some(const T* p, int n, Vec<E, N>* v) {
  T padded[N] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded, v);
}
template <class E, int N, class T>
FASTVAE_INLINE void store_some(T* p, Vec<E, N> a, int n) {
  T padded[N];
  store(padded, a);
  memcpy(p, padded, n * sizeof(T));
}

// The same of a vector that may be whole.
template <class E, int N, class T>
FASTVAE_INLINE Vec<E, N> load_first(const T* p, int n, Vec<E, N>* v) {
  return n == N ? load(p, v) : load_some(p, n, v);
}
template <class E, int N, class T>
FASTVAE_INLINE void store_first(T* p, Vec<E, N> a, int n) {
  n == N ? store(p, a) : store_some(p, a, n);
}

// Calls f(i, n) for vectors of n <= 16 numbers from `begin` on.
template <class F>
FASTVAE_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; end - i >= kLanes; i += kLanes) f(i, kLanes);
  if (i < end) f(i, int(end - i));
}

// The first `n`; the other lanes are `other`.
template <class E, int N>
FASTVAE_INLINE Vec<E, N> first_lanes(Vec<E, N> a, int n, E other = 0) {
  static constexpr E lane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(load_same<N>(lane) < Vec<E, N>(E(n)), a, Vec<E, N>(other));
}

// What `combine` makes of all lanes, in a fixed tree, the same for every register width: at each
// step lanes half the width apart.
template <class E, int Bytes, class F>
FASTVAE_INLINE E reduce_register(typename RegisterOf<E, Bytes>::type x, F combine) {
  if constexpr (Bytes == 2 * sizeof(E)) {
    return combine(x[0], x[1]);
  } else {
    typename RegisterOf<E, Bytes / 2>::type half[2];
    memcpy(half, &x, Bytes);
    return reduce_register<E, Bytes / 2>(combine(half[0], half[1]), combine);
  }
}
template <class E, class F>
FASTVAE_INLINE E reduce_lanes(Vec<E> a, F combine) {
  for (int count = Vec<E>::kCount / 2; count > 0; count /= 2)
    for (int i = 0; i < count; ++i) a.r[i] = combine(a.r[i], a.r[i + count]);
  return reduce_register<E, kRegisterBytes>(a.r[0], combine);
}
template <class E>
FASTVAE_INLINE E sum_lanes(Vec<E> a) {
  return reduce_lanes(a, [](auto x, auto y) { return x + y; });
}
template <class E>
FASTVAE_INLINE E largest_lane(Vec<E> a) {
  return reduce_lanes(a, [](auto x, auto y) { return x > y ? x : y; });
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
