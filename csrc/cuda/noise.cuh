// The normals of an access.
#pragma once

#include "../formulas/philox.h"
#include "cut.h"

namespace fastvae {

// Where the first element of a piece lies in the noise stream.
struct NoisePlace {
  int64_t row = 0, column = 0, sample = 0;
  uint64_t seed = 0;
};

__device__ inline uint64_t seed_of(const Noise& noise, int64_t row) {
  return uint64_t(noise.seed[noise.seed_per_row ? row : 0]);
}

// The normals of columns 4 quad ... 4 quad + 3.
__device__ inline void draw_four(const Noise& noise, const NoisePlace& place, uint32_t quad,
                                 float* x) {
  const uint64_t row = noise.seed_per_row ? 0 : uint64_t(place.row);
  const Block<uint32_t> counter{{quad, uint32_t(row), uint32_t(row >> 32), uint32_t(place.sample)}};
  const auto words = philox(counter, uint32_t(place.seed), uint32_t(place.seed >> 32));
  const auto a = box_muller<float>(int32_t(words.w[0]), int32_t(words.w[1]));
  const auto b = box_muller<float>(int32_t(words.w[2]), int32_t(words.w[3]));
  x[0] = a.first;
  x[1] = a.second;
  x[2] = b.first;
  x[3] = b.second;
}

// Of elements start ... start + N - 1 of a piece. More than one begin at a multiple of four
// columns.
template <int N>
__device__ void draw(const Noise& noise, const NoisePlace& piece, int start, float (&eps)[N]) {
  if constexpr (N == 1) {
    NoisePlace place = piece;
    place.row += start * noise.row.inner;
    place.column += start * noise.column.inner;
    place.sample += start * noise.sample.inner;
    if (noise.row.inner != 0) place.seed = seed_of(noise, place.row);
    float x[4];
    draw_four(noise, place, uint32_t(place.column >> 2), x);
    const bool odd = place.column & 1;
    eps[0] = place.column & 2 ? (odd ? x[3] : x[2]) : (odd ? x[1] : x[0]);
  } else {
#pragma unroll
    for (int e = 0; e < N; e += 4)
      draw_four(noise, piece, uint32_t(piece.column >> 2) + uint32_t(start + e) / 4, eps + e);
  }
}

}  // namespace fastvae
