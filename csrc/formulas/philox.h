// The noise stream: Philox4x32-10 counters to standard normals, on host and device.
//
// Philox is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011; Random123).
// The key is the 64-bit seed, the counter {column / 4, row low, row high, sample}; the four words
// of one call serve columns 4k ... 4k+3 of that row as two Box-Muller pairs. Noise therefore
// depends on nothing but (seed, row, column, sample).
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// ---- Words --------------------------------------------------------------------------------------
// One at a time, or in a vector one in the low half of each 64-bit lane (cpu/words.h).
// `wide_multiply` multiplies the low halves; whatever else stands in the high halves is ignored.

FASTVAE_INLINE uint64_t wide_multiply(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // of `uint64_t(a) * b`, nvcc 13.0 adds up high words that are 0
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}
FASTVAE_INLINE uint32_t high_word(uint64_t a) { return uint32_t(a >> 32); }
FASTVAE_INLINE uint32_t low_word(uint64_t a) { return uint32_t(a); }

template <class W>
struct Block {
  W w[4];
};

// `K` is the key's type: one word for all lanes, or a vector with a key for each. Several blocks
// take turns: each is a chain of dependent instructions, and a processor overlaps those that stand
// near each other.
template <int M, class W, class K>
FASTVAE_INLINE void philox(Block<W> (&blocks)[M], K key_low, K key_high) {
  const W m0(0xD2511F53u), m1(0xCD9E8D57u);
  FASTVAE_UNROLL
  for (int round = 0; round < 10; ++round) {
    FASTVAE_UNROLL
    for (int m = 0; m < M; ++m) {
      auto& w = blocks[m].w;
      const auto p0 = wide_multiply(w[0], m0);
      const auto p1 = wide_multiply(w[2], m1);
      blocks[m] = {high_word(p1) ^ w[1] ^ W(key_low), low_word(p1),
                   high_word(p0) ^ w[3] ^ W(key_high), low_word(p0)};
    }
    key_low = key_low + K(0x9E3779B9u);
    key_high = key_high + K(0xBB67AE85u);
  }
}
template <class W, class K>
FASTVAE_INLINE Block<W> philox(Block<W> block, K key_low, K key_high) {
  Block<W> blocks[] = {block};
  philox(blocks, key_low, key_high);
  return blocks[0];
}

// The words of columns 4k ... 4k+3, k = `block`.
FASTVAE_INLINE Block<uint32_t> words_of(const int64_t* seed, bool seed_per_row, int64_t row,
                                        int64_t block) {
  const uint64_t key = uint64_t(seed[seed_per_row ? row : 0]);
  const uint64_t rows = seed_per_row ? 0 : uint64_t(row);
  const Block<uint32_t> counter{{uint32_t(block), uint32_t(rows), uint32_t(rows >> 32), 0u}};
  return philox(counter, uint32_t(key), uint32_t(key >> 32));
}

// ---- Two words to two normals -------------------------------------------------------------------

template <class V>
struct Pair {
  V first, second;
};

// Box-Muller: sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v), u from word `a`, v from word `b`.
//
// With k = min(a, ~a), the uniform's distance to its nearer end is d = (k + 1/2) 2^-32: never 0,
// and as fine near u = 1 as near 0, so that small normals are not rounded to a spike at 0. The
// largest |normal| is sqrt(2 * 33 ln 2) = 6.76.
template <class V>
FASTVAE_INLINE Pair<V> box_muller(Int<V> a, Int<V> b) {
  using I = Int<V>;
  const auto upper = a < I(0);
  const V distance = fma(to_real(a ^ (a >> 31)), V(0x1p-32f), V(0x1p-33f));
  const Split<V> u = split(select(upper, V(1) - distance, distance));
  // 1 - d rounds d away; ln(1 - d) needs it whole.
  const V f = select(upper & (u.exponent == I(0)), V(0) - distance, u.mantissa - V(1));
  const V radius = sqrt_of_normal(V(-2) * log_of_parts(f, to_real(u.exponent)));

  // The angle is pi x + quadrant pi / 2 with |x| <= 1/4. The quadrant is the turned word's upper
  // two bits, the remainder exact.
  const I turned = wrap_add(b, I(1 << 29));
  const I remainder = wrap_sub(turned & I((1 << 30) - 1), I(1 << 29));
  const V x = fma(to_real(remainder), V(0x1p-31f), V(0x1p-32f));
  const V s = sinpi_quarter(x);
  const V c = cospi_quarter(x);
  const I doubled = turned << 1;
  const auto odd = doubled < I(0);
  const I sign(int32_t(0x80000000u));
  return {radius * as_real(as_int(select(odd, s, c)) ^ ((turned ^ doubled) & sign)),
          radius * as_real(as_int(select(odd, c, s)) ^ (turned & sign))};
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
