// Fills a buffer with the noise of one run of elements.
#pragma once

#include "../philox.h"
#include "../plan.h"
#include "vec.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// Where a run of elements starts in the noise stream, and what one step along it changes.
struct NoiseRun {
  uint64_t seed = 0;
  int64_t row = 0, column = 0, sample = 0;
};

template <class E, class F>
FASTVAE_INLINE Vec<E> from_lanes(F f) {
  E lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = E(f(l));
  return load_same(lanes);
}

// Sixteen counters' words, in 64-bit lanes as philox() left them, to their sixty-four normals: x[m]
// holds the m-th normal of each counter, lane l that of the counter in lane wide_lane(l).
FASTVAE_INLINE void normals(const Block<Words>& words, Vec<float> (&x)[4]) {
  const auto& w = words.w;
  const Pair<Vec<float>> a = box_muller<Vec<float>>(narrow(w[0]), narrow(w[1]));
  const Pair<Vec<float>> b = box_muller<Vec<float>>(narrow(w[2]), narrow(w[3]));
  x[0] = a.first;
  x[1] = a.second;
  x[2] = b.first;
  x[3] = b.second;
}

constexpr int kNormalsPerStep = 4 * kLanes;

// `count` normals of consecutive columns of one row. `buffer` has room for two steps more than
// `count`; returns where in it the first one stands.
inline const float* fill_columns(float* buffer, const NoiseRun& at, int64_t count) {
  const auto block = [](int wide) {
    for (int l = 0; l < kLanes; ++l)
      if (wide_lane(l) == wide) return block_of_lane(l);
    return 0;
  };
  const int64_t first = at.column / 4;
  const int64_t skip = at.column % 4;
  Words columns = from_lanes<uint64_t>([&](int l) { return first + block(l); });
  const Words row_low(uint32_t(at.row)), row_high(uint32_t(uint64_t(at.row) >> 32));
  const Words sample(uint32_t(at.sample));
  const Words step(kLanes);
  for (int64_t i = 0; i < skip + count; i += kNormalsPerStep) {
    Vec<float> x[4];
    normals(philox(Block<Words>{{columns, row_low, row_high, sample}}, uint32_t(at.seed),
                   uint32_t(at.seed >> 32)),
            x);
    store_blocks(buffer + i, x);
    columns = columns + step;
  }
  return buffer + skip;
}

// The general case: any step between elements in row, column and sample, one counter an element.
inline const float* fill_scattered(float* buffer, const Noise& noise, const NoiseRun& at,
                                   int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    uint64_t c[4][kLanes], key[2][kLanes];
    int32_t which[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t k = i + l < count ? i + l : count - 1;
      const int64_t row = at.row + k * noise.row.inner;
      const int64_t column = at.column + k * noise.column.inner;
      const uint64_t seed = noise.seed_per_row ? uint64_t(noise.seed[row]) : at.seed;
      const uint64_t row_word = noise.seed_per_row ? 0 : uint64_t(row);
      const uint64_t words[4] = {uint64_t(column) / 4, row_word & 0xffffffffu, row_word >> 32,
                                 uint64_t(at.sample + k * noise.sample.inner) & 0xffffffffu};
      // Narrowing pairs registers up, so that lane l of the words is read from lane wide_lane(l).
      const int wide = wide_lane(l);
      for (int m = 0; m < 4; ++m) c[m][wide] = words[m];
      key[0][wide] = seed & 0xffffffffu;
      key[1][wide] = seed >> 32;
      which[l] = int32_t(column % 4);
    }
    Vec<float> x[4];
    normals(philox(Block<Words>{{load_same(c[0]), load_same(c[1]), load_same(c[2]), load_same(c[3])}},
                   load_same(key[0]), load_same(key[1])),
            x);
    const Vec<int32_t> m = load_same(which);
    using I = Vec<int32_t>;
    store(buffer + i, select(m < I(2), select(m == I(0), x[0], x[1]), select(m == I(2), x[2], x[3])));
  }
  return buffer;
}

inline const float* fill(float* buffer, const Noise& noise, const NoiseRun& at, int64_t count) {
  const bool columns =
      noise.column.inner == 1 && noise.row.inner == 0 && noise.sample.inner == 0;
  return columns || count == 1 ? fill_columns(buffer, at, count)
                               : fill_scattered(buffer, noise, at, count);
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
