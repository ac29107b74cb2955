// Fills a buffer with the noise of one run of elements.
#pragma once

#include "../plan.h"
#include "words.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// A run of elements: `pieces` pieces of `length` elements each, the first of which stands at `row`,
// `column`, `sample` of the stream. The `..._step`s lead from piece to piece; from element to
// element it is the `inner` strides of the plan's noise.
struct NoiseRun {
  int64_t pieces = 1, length = 0;
  int64_t row = 0, column = 0, sample = 0;
  int64_t row_step = 0, column_step = 0, sample_step = 0;
};

template <class E, class F>
FASTVAE_INLINE Vec<E> from_lanes(F f) {
  E lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = E(f(l));
  return load_same(lanes);
}

// Sixteen counters' words, in 64-bit lanes as philox() left them, to memory: sixteen first words,
// sixteen second ones and so on, lane l from lane wide_lane(l).
FASTVAE_INLINE void store_words(float* p, const Block<Words>& words) {
  for (int m = 0; m < 4; ++m) store_same(p + m * kLanes, as_real(narrow(words.w[m])));
}

// Their sixty-four normals; x[m] holds the m-th of each counter.
FASTVAE_INLINE void load_normals(const float* p, Vec<float> (&x)[4]) {
  Vec<int32_t> w[4];
  for (int m = 0; m < 4; ++m) w[m] = as_int(load_same(p + m * kLanes));
  const Pair<Vec<float>> a = box_muller<Vec<float>>(w[0], w[1]);
  const Pair<Vec<float>> b = box_muller<Vec<float>>(w[2], w[3]);
  x[0] = a.first;
  x[1] = a.second;
  x[2] = b.first;
  x[3] = b.second;
}

constexpr int kNormalsPerStep = 4 * kLanes;
// Vectors of counters whose words are computed in turns. The wider the registers, the fewer a
// vector takes, and the more vectors fill them (measured: 0.20 to 0.14 ns a normal's words with
// AVX-512).
constexpr int kTurns = kRegisterBytes / 16;

// In each 64-bit lane the place at which store_blocks() puts its counter's normals.
struct WideLanes {
  uint64_t place[kLanes] = {};
};
constexpr WideLanes kPlaces = [] {
  WideLanes table;
  for (int l = 0; l < kLanes; ++l) table.place[wide_lane(l)] = block_of_lane(l);
  return table;
}();

// Consecutive columns within a piece: a counter serves four elements. Each piece gets whole
// counters; piece p starts at `buffer[p * 4 * ceil((skip + length) / 4) + skip]`, skip = column
// % 4. Needs: the pieces' columns are equal modulo 4; steps below 2^32.
inline void fill_columns(float* buffer, const Noise& noise, const NoiseRun& run) {
  const int64_t counters = (run.column % 4 + run.length + 3) / 4;  // of a piece
  const int64_t total = run.pieces * counters;
  // Lane by lane the piece, and the counter within it. Where a counter passes its piece's end, it
  // carries into the piece: no divisions, which would take longer than the normals.
  Words piece(0), counter = load_same(kPlaces.place);
  const Words end(static_cast<uint64_t>(counters));
  for (int64_t reach = counters; reach < kLanes; reach += counters) {
    const auto carry = reinterpret<uint64_t>(counter >= end);
    counter = counter - (end & carry);
    piece = piece + (Words(1) & carry);
  }
  const auto at_piece = [piece](int64_t first, int64_t step) {
    return Words(uint64_t(first)) + wide_multiply(piece, Words(uint64_t(step)));
  };
  Words column = at_piece(run.column / 4, run.column_step / 4);
  Words row = at_piece(run.row, run.row_step), sample = at_piece(run.sample, run.sample_step);

  // With a seed for each row, the row stands in the key instead of the counter.
  const uint64_t seed = uint64_t(noise.seed[noise.seed_per_row ? run.row : 0]);
  const bool many_seeds = noise.seed_per_row && run.row_step != 0 && run.pieces > 1;
  if (noise.seed_per_row && !many_seeds) row = Words(0);
  const auto draw_by_row = [&](int64_t i) __attribute__((always_inline)) {
    const int64_t last_row = run.row + (run.pieces - 1) * run.row_step;
    int64_t rows[kLanes];
    store_same(rows, reinterpret<int64_t>(row));
    // Lanes past the last piece draw with its seed; nobody reads them.
    const Words seeds = from_lanes<uint64_t>(
        [&](int l) { return noise.seed[rows[l] < last_row ? rows[l] : last_row]; });
    const Block<Words> words{{column + counter, Words(0), Words(0), sample}};
    store_words(buffer + 4 * i, philox(words, seeds, seeds >> 32));
  };
  // M vectors of counters; `go_on` leads from one to the next.
  const auto draw = [&]<int M>(int64_t i, auto go_on) __attribute__((always_inline)) {
    Block<Words> words[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      words[m] = {{column + counter, row, row >> 32, sample}};
      go_on();
    }
    philox(words, uint32_t(seed), uint32_t(seed >> 32));
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) store_words(buffer + 4 * (i + m * kLanes), words[m]);
  };
  const auto draw_all = [&](auto go_on) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; total - i >= kTurns * kLanes; i += kTurns * kLanes)
      draw.template operator()<kTurns>(i, go_on);
    for (; i < total; i += kLanes) draw.template operator()<1>(i, go_on);
  };
  if (run.pieces == 1) {
    draw_all([&]() __attribute__((always_inline)) { counter = counter + Words(kLanes); });
  } else {
    // Every lane goes on by `pieces` pieces and `rest` counters, and where it passes its piece's
    // end by a piece more.
    const int64_t pieces = kLanes / counters;
    const Words rest(uint64_t(kLanes % counters));
    const auto move = [pieces](Words& x, int64_t step, Mask<uint64_t> past) {
      x = x + select(past, Words(uint64_t((pieces + 1) * step)), Words(uint64_t(pieces * step)));
    };
    const bool rows_only = run.column_step == 0 && run.sample_step == 0;
    const auto go_on = [&]() __attribute__((always_inline)) {
      counter = counter + rest;
      const auto past = counter >= end;
      counter = select(past, counter - end, counter);
      move(row, run.row_step, past);
      if (rows_only) return;
      move(column, run.column_step / 4, past);
      move(sample, run.sample_step, past);
    };
    if (many_seeds)
      for (int64_t i = 0; i < total; i += kLanes, go_on()) draw_by_row(i);
    else
      draw_all(go_on);
  }
  // In a loop of its own: the processor overlaps more iterations of two short loops than of one
  // long one, and both are chains of dependent instructions (measured: 1.2 to 0.7 ns a normal).
  for (int64_t i = 0; i < total; i += kLanes) {
    Vec<float> x[4];
    load_normals(buffer + 4 * i, x);
    store_blocks(buffer + 4 * i, x);
  }
}

// The general case: any step between elements, one counter an element.
inline void fill_scattered(float* buffer, const Noise& noise, const NoiseRun& run) {
  const int64_t total = run.pieces * run.length;
  for (int64_t i = 0; i < total; i += kLanes) {
    uint64_t c[4][kLanes], key[2][kLanes];
    int32_t which[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t k = i + l < total ? i + l : total - 1;
      const int64_t p = k / run.length, j = k % run.length;
      const int64_t row = run.row + p * run.row_step + j * noise.row.inner;
      const int64_t column = run.column + p * run.column_step + j * noise.column.inner;
      const int64_t sample = run.sample + p * run.sample_step + j * noise.sample.inner;
      const uint64_t seed = uint64_t(noise.seed[noise.seed_per_row ? row : 0]);
      const uint64_t row_words = noise.seed_per_row ? 0 : uint64_t(row);
      const uint64_t words[4] = {uint64_t(column) / 4, row_words, row_words >> 32,
                                 uint64_t(sample)};
      // Narrowing pairs registers up, so that lane l of the words is read from lane wide_lane(l).
      const int wide = wide_lane(l);
      for (int m = 0; m < 4; ++m) c[m][wide] = words[m];
      key[0][wide] = seed;
      key[1][wide] = seed >> 32;
      which[l] = int32_t(column % 4);
    }
    float words[kNormalsPerStep];
    const Block<Words> counters{
        {load_same(c[0]), load_same(c[1]), load_same(c[2]), load_same(c[3])}};
    store_words(words, philox(counters, load_same(key[0]), load_same(key[1])));
    Vec<float> x[4];
    load_normals(words, x);
    using I = Vec<int32_t>;
    const I m = load_same(which);
    store(buffer + i,
          select(m < I(2), select(m == I(0), x[0], x[1]), select(m == I(2), x[2], x[3])));
  }
}

// Draws a run into `buffer`, which has room for twice its elements and two steps; returns where its
// first element stands. The elements of all pieces follow each other.
inline const float* fill(float* buffer, const Noise& noise, const NoiseRun& run) {
  const bool columns =
      run.length == 1 ? run.pieces == 1
                      : noise.column.inner == 1 && noise.row.inner == 0 && noise.sample.inner == 0;
  const int64_t skip = run.column % 4;
  if (!columns || (run.pieces > 1 && (skip != 0 || run.column_step % 4 != 0))) {
    fill_scattered(buffer, noise, run);
    return buffer;
  }
  fill_columns(buffer, noise, run);
  const int64_t drawn = (skip + run.length + 3) / 4 * 4;
  // Counter by counter; what is too much lands where the next piece has not been yet.
  if (drawn != run.length)
    for (int64_t p = 1; p < run.pieces; ++p)
      for (int64_t k = 0; k < drawn; k += 4)
        memmove(buffer + p * run.length + k, buffer + p * drawn + k, 4 * sizeof(float));
  return buffer + skip;
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
