// What Philox needs of vectors: 32-bit words in 64-bit lanes, and the way from there to memory.
#pragma once

#include "../formulas/philox.h"
#include "memory.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

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
  Vec<int32_t> y;
#if defined(__AVX512F__)
  const auto real = [](auto x) { return (__m512)x; };
  y.r[0] = (Vec<int32_t>::Register)_mm512_mask_moveldup_ps(real(a.r[0]), 0xaaaa, real(a.r[1]));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i)
    y.r[i] = (Vec<int32_t>::Register)_mm256_blend_ps(
        (__m256)a.r[2 * i], _mm256_moveldup_ps((__m256)a.r[2 * i + 1]), 0xaa);
#else
  const Words low = a & Words(0xffffffffu);
  const Words high = a << 32;
  for (int i = 0; i < Vec<int32_t>::kCount; ++i)
    y.r[i] = (Vec<int32_t>::Register)(low.r[2 * i] | high.r[2 * i + 1]);
#endif
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
