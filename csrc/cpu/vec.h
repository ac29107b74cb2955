// Vec<E>: sixteen numbers in as many registers as the instruction set needs.
//
// Sixteen whatever the instruction set and the type, so that sums over lanes have one order
// everywhere. Registers are the compiler's vector extension; intrinsics appear only where it has no
// word for an instruction: fused multiply-add, square root, half precision, widening multiply, and
// the transposition of four-word blocks.
#pragma once

#include <type_traits>

#include "../math.h"

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

template <class E>
struct Vec {
  using Register = typename RegisterOf<E, kRegisterBytes>::type;
  static constexpr int kPer = kRegisterBytes / sizeof(E);
  static constexpr int kCount = kLanes / kPer;
  Register r[kCount];

  Vec() = default;
  FASTVAE_INLINE explicit Vec(E x) {
    for (int i = 0; i < kCount; ++i) r[i] = Register{} + x;
  }
};

template <>
struct Numeric<Vec<float>> {
  using Real = float;
  using Int = Vec<int32_t>;
};
template <>
struct Numeric<Vec<double>> {
  using Real = double;
  using Int = Vec<int64_t>;
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
struct MaskOf<uint64_t> {
  using type = int64_t;
};
template <class E>
using Mask = Vec<typename MaskOf<E>::type>;

// Applies `f` register by register.
template <class To, class F, class... From>
FASTVAE_INLINE Vec<To> each(F f, const Vec<From>&... a) {
  static_assert(((sizeof(From) == sizeof(To)) && ...));
  Vec<To> y;
#pragma GCC unroll 8
  for (int i = 0; i < Vec<To>::kCount; ++i) y.r[i] = (typename Vec<To>::Register)f(a.r[i]...);
  return y;
}

// Integer sums wrap: the lanes are added as unsigned.
template <class E>
FASTVAE_INLINE Vec<E> operator+(Vec<E> a, Vec<E> b) {
  return each<E>([](auto x, auto y) { return x + y; }, a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> operator-(Vec<E> a, Vec<E> b) {
  return each<E>([](auto x, auto y) { return x - y; }, a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> operator*(Vec<E> a, Vec<E> b) {
  return each<E>([](auto x, auto y) { return x * y; }, a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> operator/(Vec<E> a, Vec<E> b) {
  return each<E>([](auto x, auto y) { return x / y; }, a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> operator&(Vec<E> a, Vec<E> b) {
  return each<E>([](auto x, auto y) { return x & y; }, a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> operator|(Vec<E> a, Vec<E> b) {
  return each<E>([](auto x, auto y) { return x | y; }, a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> operator^(Vec<E> a, Vec<E> b) {
  return each<E>([](auto x, auto y) { return x ^ y; }, a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> operator<<(Vec<E> a, int n) {
  return each<E>([n](auto x) { return x << n; }, a);
}
template <class E>
FASTVAE_INLINE Vec<E> operator>>(Vec<E> a, int n) {
  return each<E>([n](auto x) { return x >> n; }, a);
}
template <class E>
FASTVAE_INLINE Mask<E> operator<(Vec<E> a, Vec<E> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x < y; }, a, b);
}
template <class E>
FASTVAE_INLINE Mask<E> operator>(Vec<E> a, Vec<E> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x > y; }, a, b);
}
template <class E>
FASTVAE_INLINE Mask<E> operator>=(Vec<E> a, Vec<E> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x >= y; }, a, b);
}
template <class E>
FASTVAE_INLINE Mask<E> operator==(Vec<E> a, Vec<E> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x == y; }, a, b);
}
template <class E>
FASTVAE_INLINE Mask<E> operator!=(Vec<E> a, Vec<E> b) {
  return each<typename MaskOf<E>::type>([](auto x, auto y) { return x != y; }, a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> select(Mask<E> condition, Vec<E> a, Vec<E> b) {
  return each<E>([](auto c, auto x, auto y) { return c ? x : y; }, condition, a, b);
}

template <class To, class From>
FASTVAE_INLINE Vec<To> reinterpret(Vec<From> a) {
  return each<To>([](auto x) { return x; }, a);
}
FASTVAE_INLINE Vec<int32_t> as_int(Vec<float> a) { return reinterpret<int32_t>(a); }
FASTVAE_INLINE Vec<int64_t> as_int(Vec<double> a) { return reinterpret<int64_t>(a); }
FASTVAE_INLINE Vec<float> as_real(Vec<int32_t> a) { return reinterpret<float>(a); }
FASTVAE_INLINE Vec<double> as_real(Vec<int64_t> a) { return reinterpret<double>(a); }
FASTVAE_INLINE Vec<float> to_real(Vec<int32_t> a) {
  return each<float>(
      [](auto x) { return __builtin_convertvector(x, typename Vec<float>::Register); }, a);
}
FASTVAE_INLINE Vec<double> to_real(Vec<int64_t> a) {
  return each<double>(
      [](auto x) { return __builtin_convertvector(x, typename Vec<double>::Register); }, a);
}
template <class E>
FASTVAE_INLINE Vec<E> wrap_add(Vec<E> a, Vec<E> b) {
  using U = Vec<std::make_unsigned_t<E>>;
  return each<E>([](auto x, auto y) { return (typename U::Register)x + (typename U::Register)y; },
                 a, b);
}
template <class E>
FASTVAE_INLINE Vec<E> wrap_sub(Vec<E> a, Vec<E> b) {
  using U = Vec<std::make_unsigned_t<E>>;
  return each<E>([](auto x, auto y) { return (typename U::Register)x - (typename U::Register)y; },
                 a, b);
}

// ---- What the vector extension cannot say --------------------------------------------------------

#if !defined(__AVX512F__) && !defined(__FMA__) && !defined(__aarch64__)
// Without the instruction: a call each, since sixteen copies in every formula would take minutes to
// compile. The float product is exact in double; the sum is rounded to odd (Boldo & Melquiond 2008),
// after which rounding to float is the only rounding.
[[gnu::noinline]] inline Vec<float> fma_without_instruction(Vec<float> a, Vec<float> b,
                                                            Vec<float> c) {
  for (int l = 0; l < kLanes; ++l) {
    const int i = l / Vec<float>::kPer, k = l % Vec<float>::kPer;
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
[[gnu::noinline]] inline Vec<double> fma_without_instruction(Vec<double> a, Vec<double> b,
                                                             Vec<double> c) {
  for (int i = 0; i < Vec<double>::kCount; ++i)
    for (int k = 0; k < Vec<double>::kPer; ++k)
      c.r[i][k] = __builtin_fma(a.r[i][k], b.r[i][k], c.r[i][k]);
  return c;
}
#endif

FASTVAE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
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

FASTVAE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
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

FASTVAE_INLINE Vec<float> sqrt(Vec<float> a) {
#if defined(__AVX512F__)
  return each<float>([](auto x) { return _mm512_sqrt_ps(x); }, a);
#elif defined(__AVX2__)
  return each<float>([](auto x) { return _mm256_sqrt_ps(x); }, a);
#elif defined(__SSE2__)
  return each<float>([](auto x) { return _mm_sqrt_ps(x); }, a);
#elif defined(__aarch64__)
  return each<float>([](auto x) { return vsqrtq_f32(x); }, a);
#else
  for (int i = 0; i < Vec<float>::kCount; ++i)
    for (int k = 0; k < Vec<float>::kPer; ++k) a.r[i][k] = __builtin_sqrtf(a.r[i][k]);
  return a;
#endif
}

FASTVAE_INLINE Vec<double> sqrt(Vec<double> a) {
#if defined(__AVX512F__)
  return each<double>([](auto x) { return _mm512_sqrt_pd(x); }, a);
#elif defined(__AVX2__)
  return each<double>([](auto x) { return _mm256_sqrt_pd(x); }, a);
#elif defined(__SSE2__)
  return each<double>([](auto x) { return _mm_sqrt_pd(x); }, a);
#elif defined(__aarch64__)
  return each<double>([](auto x) { return vsqrtq_f64(x); }, a);
#else
  for (int i = 0; i < Vec<double>::kCount; ++i)
    for (int k = 0; k < Vec<double>::kPer; ++k) a.r[i][k] = __builtin_sqrt(a.r[i][k]);
  return a;
#endif
}

// ---- Loads and stores, converting ----------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What a type is computed in.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

using HalfRegister = RegisterOf<uint16_t, kRegisterBytes / 2>::type;

// Register by register: gcc copies a larger struct in 16-byte pieces, and reading those back whole
// stalls on store forwarding (measured: KL under AVX2 took five times as long).
template <class E>
FASTVAE_INLINE Vec<E> load_same(const E* p) {
  Vec<E> y;
  for (int i = 0; i < Vec<E>::kCount; ++i) memcpy(&y.r[i], p + i * Vec<E>::kPer, kRegisterBytes);
  return y;
}
template <class E>
FASTVAE_INLINE void store_same(E* p, Vec<E> a) {
  for (int i = 0; i < Vec<E>::kCount; ++i) memcpy(p + i * Vec<E>::kPer, &a.r[i], kRegisterBytes);
}
FASTVAE_INLINE Vec<float> load(const float* p, Vec<float>*) { return load_same(p); }
FASTVAE_INLINE Vec<double> load(const double* p, Vec<double>*) { return load_same(p); }
FASTVAE_INLINE Vec<double> load(const float* p, Vec<double>*) {
  using Narrow = RegisterOf<float, kRegisterBytes / 2>::type;
  Vec<double> y;
  for (int i = 0; i < Vec<double>::kCount; ++i) {
    Narrow x;
    memcpy(&x, p + i * Vec<double>::kPer, sizeof(x));
    y.r[i] = __builtin_convertvector(x, Vec<double>::Register);
  }
  return y;
}

FASTVAE_INLINE Vec<int32_t> load_words(const uint16_t* p) {
  Vec<int32_t> y;
  for (int i = 0; i < Vec<int32_t>::kCount; ++i) {
    HalfRegister x;
    memcpy(&x, p + i * Vec<int32_t>::kPer, sizeof(x));
    y.r[i] = __builtin_convertvector(x, Vec<int32_t>::Register);
  }
  return y;
}
FASTVAE_INLINE void store_words(uint16_t* p, Vec<int32_t> a) {
  for (int i = 0; i < Vec<int32_t>::kCount; ++i) {
    const HalfRegister x = __builtin_convertvector(a.r[i], HalfRegister);
    memcpy(p + i * Vec<int32_t>::kPer, &x, sizeof(x));
  }
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

FASTVAE_INLINE void store(float* p, Vec<float> a) { store_same(p, a); }
FASTVAE_INLINE void store(double* p, Vec<double> a) { store_same(p, a); }
FASTVAE_INLINE void store(bfloat16* p, Vec<float> a) {  // to nearest, ties to even
  using I = Vec<int32_t>;
  const I bits = as_int(a);
  const I rounded = wrap_add(bits, I(0x7fff) + ((bits >> 16) & I(1)));
  store_words(&p->bits, (select(a != a, bits | I(0x400000), rounded) >> 16) & I(0xffff));
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
  store_words(&p->bits, bits | ((as_int(a) >> 16) & I(0x8000)));
#endif
}

// The first `n` < 16 numbers; the other lanes are 0.
template <class E, class T>
FASTVAE_INLINE Vec<E> load_some(const T* p, int n, Vec<E>* v) {
  T padded[kLanes] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded, v);
}
template <class E, class T>
FASTVAE_INLINE void store_some(T* p, Vec<E> a, int n) {
  T padded[kLanes];
  store(padded, a);
  memcpy(p, padded, n * sizeof(T));
}

template <class E>
FASTVAE_INLINE Vec<E> first_lanes(Vec<E> a, int n) {
  E lanes[kLanes];
  store(lanes, a);
  for (int i = n; i < kLanes; ++i) lanes[i] = 0;
  return load_same(lanes);
}

// A fixed tree, the same for every register width.
template <class E>
FASTVAE_INLINE E sum_lanes(Vec<E> a) {
  E x[kLanes];
  store(x, a);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// ---- Words in 64-bit lanes, for Philox -----------------------------------------------------------

using Words = Vec<uint64_t>;

FASTVAE_INLINE Words wide_multiply(Words a, Words b) {
#if defined(__AVX512F__)
  return each<uint64_t>([](auto x, auto y) { return _mm512_mul_epu32((__m512i)x, (__m512i)y); }, a,
                        b);
#elif defined(__AVX2__)
  return each<uint64_t>([](auto x, auto y) { return _mm256_mul_epu32((__m256i)x, (__m256i)y); }, a,
                        b);
#elif defined(__SSE2__)
  return each<uint64_t>([](auto x, auto y) { return _mm_mul_epu32((__m128i)x, (__m128i)y); }, a, b);
#else
  const Words low(0xffffffffu);
  return (a & low) * (b & low);
#endif
}
FASTVAE_INLINE Words high_word(Words a) { return a >> 32; }
FASTVAE_INLINE Words low_word(Words a) { return a; }

// Two 64-bit registers make one of 32-bit words by interleaving, so lane l of the result holds the
// word of 64-bit lane `wide_lane(l)`.
constexpr int wide_lane(int l) {
  constexpr int per = Words::kPer;
  const int pair = l / (2 * per), within = l % (2 * per);
  return (2 * pair + within % 2) * per + within / 2;
}
FASTVAE_INLINE Vec<int32_t> narrow(Words a) {
  const Words low = a & Words(0xffffffffu);
  const Words high = a << 32;
  Vec<int32_t> y;
  for (int i = 0; i < Vec<int32_t>::kCount; ++i)
    y.r[i] = (Vec<int32_t>::Register)(low.r[2 * i] | high.r[2 * i + 1]);
  return y;
}

// Writes 64 numbers: four from each of 16 blocks, whose m-th numbers stand in x[m]. Lane 4b + m of
// the inputs belongs to block 4m + b, which makes it a transposition within 128-bit lanes.
constexpr int block_of_lane(int l) { return 4 * (l % 4) + l / 4; }

FASTVAE_INLINE void store_blocks(float* p, const Vec<float> (&x)[4]) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps(x[0].r[0], x[1].r[0]);
  const __m512 b = _mm512_unpackhi_ps(x[0].r[0], x[1].r[0]);
  const __m512 c = _mm512_unpacklo_ps(x[2].r[0], x[3].r[0]);
  const __m512 d = _mm512_unpackhi_ps(x[2].r[0], x[3].r[0]);
  const auto pd = [](__m512 v) { return _mm512_castps_pd(v); };
  _mm512_storeu_pd(p, _mm512_unpacklo_pd(pd(a), pd(c)));
  _mm512_storeu_pd(p + 16, _mm512_unpackhi_pd(pd(a), pd(c)));
  _mm512_storeu_pd(p + 32, _mm512_unpacklo_pd(pd(b), pd(d)));
  _mm512_storeu_pd(p + 48, _mm512_unpackhi_pd(pd(b), pd(d)));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m256 a = _mm256_unpacklo_ps(x[0].r[i], x[1].r[i]);
    const __m256 b = _mm256_unpackhi_ps(x[0].r[i], x[1].r[i]);
    const __m256 c = _mm256_unpacklo_ps(x[2].r[i], x[3].r[i]);
    const __m256 d = _mm256_unpackhi_ps(x[2].r[i], x[3].r[i]);
    const auto pd = [](__m256 v) { return _mm256_castps_pd(v); };
    const auto out = [p, i](int m) { return reinterpret_cast<double*>(p + 16 * m + 8 * i); };
    _mm256_storeu_pd(out(0), _mm256_unpacklo_pd(pd(a), pd(c)));
    _mm256_storeu_pd(out(1), _mm256_unpackhi_pd(pd(a), pd(c)));
    _mm256_storeu_pd(out(2), _mm256_unpacklo_pd(pd(b), pd(d)));
    _mm256_storeu_pd(out(3), _mm256_unpackhi_pd(pd(b), pd(d)));
  }
#else
  for (int m = 0; m < 4; ++m) {
    float lanes[kLanes];
    store(lanes, x[m]);
    for (int l = 0; l < kLanes; ++l) p[4 * block_of_lane(l) + m] = lanes[l];
  }
#endif
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
