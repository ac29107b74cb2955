// The CPU loop: a map over elements, with the value summed over rows.
//
// Every op runs through `run`. It walks the units it is given piece by piece and block by block; a
// block's noise is drawn into a buffer that stays in the first-level cache, and `block` applies the
// op's formula to sixteen elements at a time. The tail is the loop's business: a last vector is
// loaded, stored and summed in part.
#pragma once

#include "../plan.h"
#include "../formulas.h"
#include "kernels.h"
#include "noise.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

constexpr int64_t kBlock = 512;

// Offsets of every operand at the current piece, advanced by addition.
template <int I, int O>
struct Cursor {
  enum Slot { kInput = 0, kOutput = I, kRowGrad = I + O, kValue, kRow, kColumn, kSample, kCount };

  const Plan& plan;
  const Layout* layout[kCount];
  int64_t offset[kCount];
  int64_t index[kMaxDims];

  Cursor(const Plan& p, int64_t piece) : plan(p) {
    for (int k = 0; k < I; ++k) layout[kInput + k] = &p.input[k].layout;
    for (int k = 0; k < O; ++k) layout[kOutput + k] = &p.output[k].layout;
    layout[kRowGrad] = &p.row_grad.layout;
    layout[kValue] = &p.value.layout;
    layout[kRow] = &p.noise.row;
    layout[kColumn] = &p.noise.column;
    layout[kSample] = &p.noise.sample;
    for (int k = 0; k < kCount; ++k) offset[k] = 0;
#pragma GCC unroll 1
    for (int d = p.dims - 1; d >= 0; --d) {
      index[d] = piece % p.size[d];
      piece /= p.size[d];
      for (int k = 0; k < kCount; ++k) offset[k] += index[d] * layout[k]->stride[d];
    }
  }

  void next() {
#pragma GCC unroll 1
    for (int d = plan.dims - 1; d >= 0; --d) {
      const bool carry = ++index[d] == plan.size[d];
      const int64_t step = carry ? 1 - plan.size[d] : 1;
      for (int k = 0; k < kCount; ++k) offset[k] += step * layout[k]->stride[d];
      if (!carry) return;
      index[d] = 0;
    }
  }
};

template <class Op, class T>
class Loop {
  using A = Accumulate<T>;
  using V = Vec<A>;
  static constexpr Step kStep = Op::step;
  static constexpr int I = kStep.inputs, O = kStep.outputs;
  using At = Cursor<I, O>;

 public:
  // Units [begin, end). Reduced outputs go to slot `slot`.
  static void run(const Plan& plan, int64_t begin, int64_t end, int64_t slot) {
    Loop loop(plan, slot);
    for (int64_t unit = begin; unit < end;) {
      // Neighbouring units of whole pieces follow each other: the cursor need not be set anew.
      const int64_t row = unit / plan.units_per_row, in_row = unit % plan.units_per_row;
      const int64_t piece_in_row = in_row / plan.segments * plan.pieces_per_unit;
      At at(plan, row * plan.pieces_per_row + piece_in_row);
      if (plan.segments > 1) {
        const int64_t first = in_row % plan.segments * plan.segment_size;
        loop.begin_sum();
        loop.piece(at, first, smaller(first + plan.segment_size, plan.inner));
        loop.end_sum(unit++);
        continue;
      }
      int64_t left = smaller(plan.pieces_per_unit, plan.pieces_per_row - piece_in_row);
      loop.begin_sum();
      for (;;) {
        loop.piece(at, 0, plan.inner);
        if (--left > 0) {
          at.next();
          continue;
        }
        loop.end_sum(unit++);
        if (unit == end) break;
        const int64_t next_in_row = unit % plan.units_per_row;
        left = smaller(plan.pieces_per_unit,
                       plan.pieces_per_row - next_in_row * plan.pieces_per_unit);
        loop.begin_sum();
        at.next();
      }
    }
  }

 private:
  Loop(const Plan& plan, int64_t slot) : plan_(plan), scale_{plan.scale}, slot_(slot) {}

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  void begin_sum() { total_ = 0; }
  void end_sum(int64_t unit) {
    if (kStep.value && plan_.unit_sums) static_cast<A*>(plan_.unit_sums)[unit] = A(total_);
  }

  // Elements [first, last) of the piece under the cursor.
  void piece(const At& at, int64_t first, int64_t last) {
    Noise noise = plan_.noise;
    for (int64_t j = first; j < last; j += kBlock) {
      const int n = int(smaller(kBlock, last - j));
      const float* eps = nullptr;
      if constexpr (kStep.noise) {
        NoiseRun run{0, at.offset[At::kRow] + j * noise.row.inner,
                     at.offset[At::kColumn] + j * noise.column.inner,
                     at.offset[At::kSample] + j * noise.sample.inner};
        run.seed = uint64_t(noise.seed[noise.seed_per_row ? run.row : 0]);
        if (noise.seed_per_row && noise.row.inner == 0) run.row = 0;
        eps = fill(noise_, noise, run, n);
      }
      block(at, j, n, eps);
    }
  }

  // A stream of numbers that a block reads: from memory, or one number over and over.
  template <class S>
  struct Source {
    const S* p;
    int step;
    S padded[kLanes];

    void open(const Input& input, int64_t offset, int64_t j) {
      step = int(input.layout.inner);
      p = static_cast<const S*>(input.data) + offset + j;
      if (step != 0) return;
      S x;
      if (input.data)
        x = static_cast<const S*>(input.data)[offset];
      else
        store_some(&x, V(A(input.constant)), 1);
      for (S& lane : padded) lane = x;
      p = padded;
    }
    // Makes the last `n` < 16 numbers, from i on, a whole vector.
    void pad(int i, int n) {
      if (step == 0) return;
      memset(padded, 0, sizeof(padded));
      memcpy(padded, p + i, n * sizeof(S));
      step = 0;
      p = padded;
    }
    V get(int i) const { return load(p + i * step, static_cast<V*>(nullptr)); }
  };

  void block(const At& at, int64_t j, int n, const float* eps) {
    Source<T> in[I];
    for (int k = 0; k < I; ++k) in[k].open(plan_.input[k], at.offset[At::kInput + k], j);
    Source<A> row_grad;
    if constexpr (kStep.row_grad) row_grad.open(plan_.row_grad, at.offset[At::kRowGrad], j);

    // Reduced outputs are kept for the block: the sum over it, or each element in `scratch_`.
    T* full[O > 0 ? O : 1];
    V sums[O > 0 ? O : 1];
    for (int k = 0; k < O; ++k) {
      const Output& out = plan_.output[k];
      full[k] = out.mode == Mode::full
                    ? static_cast<T*>(out.data) + at.offset[At::kOutput + k] + j
                    : nullptr;
      sums[k] = V(0);
    }
    A* value = kStep.value && plan_.value.mode == Mode::full
                   ? static_cast<A*>(plan_.value.data) + at.offset[At::kValue] + j
                   : nullptr;
    V sum(0);

    for (int i = 0; i < n; i += kLanes) {
      const int m = n - i;
      const bool whole = m >= kLanes;
      if (!whole) {
        for (int k = 0; k < I; ++k) in[k].pad(i, m);
        if constexpr (kStep.row_grad) row_grad.pad(i, m);
      }
      V x[I], y[O > 0 ? O : 1], g(0), e(0);
#pragma GCC unroll 8
      for (int k = 0; k < I; ++k) x[k] = in[k].get(i);
      if constexpr (kStep.row_grad) g = row_grad.get(i);
      // The noise buffer is longer than the block, so its last vector is always whole.
      if constexpr (kStep.noise) e = load(eps + i, static_cast<V*>(nullptr));
      const V v = Op::apply(scale_, x, g, e, y);
      if constexpr (kStep.value) {
        if (value) whole ? store(value + i, v) : store_some(value + i, v, m);
        sum = sum + (whole ? v : first_lanes(v, m));
      }
#pragma GCC unroll 8
      for (int k = 0; k < O; ++k) {
        const Output& out = plan_.output[k];
        if (full[k])
          whole ? store(full[k] + i, y[k]) : store_some(full[k] + i, y[k], m);
        else if (out.mode == Mode::reduced && out.layout.inner == 0)
          sums[k] = sums[k] + (whole ? y[k] : first_lanes(y[k], m));
        else if (out.mode == Mode::reduced)
          store(scratch_[k] + i, y[k]);
      }
    }

    if (kStep.value && plan_.unit_sums) total_ += sum_lanes(sum);
    for (int k = 0; k < O; ++k) {
      const Output& out = plan_.output[k];
      if (out.mode != Mode::reduced) continue;
      A* to = static_cast<A*>(out.data) + slot_ * out.extent + at.offset[At::kOutput + k];
      if (out.layout.inner == 0)
        *to += sum_lanes(sums[k]);
      else
        for (int i = 0; i < n; ++i) to[j + i] += scratch_[k][i];
    }
  }

  const Plan& plan_;
  const Scale scale_;
  const int64_t slot_;
  double total_ = 0;  // over blocks, whose own sums have at most 32 terms a lane
  alignas(64) float noise_[kStep.noise ? kBlock + 2 * kNormalsPerStep : 1];
  alignas(64) A scratch_[O > 0 ? O : 1][kBlock];
};

// One row of the kernel table for each step, one column for each type.
template <class... Ops>
constexpr KernelTable make_table(List<Ops...>) {
  return {{{Loop<Ops, float>::run, Loop<Ops, double>::run, Loop<Ops, bfloat16>::run,
            Loop<Ops, float16>::run}...}};
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
