// The CPU loop: a map over elements, with the value summed over rows.
//
// Every op runs through `run`. It walks its units block by block; a block is part of a long piece
// or several whole short ones, at most `kBlock` elements. A block's noise is drawn into a buffer
// that stays in the first-level cache, operands whose pieces do not follow each other in memory are
// gathered into one, and then the op's formula is applied to sixteen elements at a time. The tail
// is the loop's business: a last vector is loaded, stored and summed in part.
#pragma once

#include "../plan.h"
#include "elements.h"
#include "kernels.h"
#include "noise.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

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

  // Pieces from here on that one step along the last outer dimension leads through.
  int64_t straight() const {
    return plan.dims ? plan.size[plan.dims - 1] - index[plan.dims - 1] : 1;
  }
  static int64_t step(const Plan& plan, const Layout& layout) {
    return plan.dims ? layout.stride[plan.dims - 1] : 0;
  }

  // On by `pieces`, at most straight().
  void advance(int64_t pieces) {
#pragma GCC unroll 1
    for (int d = plan.dims - 1; d >= 0; --d) {
      index[d] += pieces;
      const bool carry = index[d] == plan.size[d];
      const int64_t step = carry ? pieces - plan.size[d] : pieces;
      for (int k = 0; k < kCount; ++k) offset[k] += step * layout[k]->stride[d];
      if (!carry) return;
      index[d] = 0;
      pieces = 1;
    }
  }
};

// `n` numbers within the scale's bound, and the slopes. A function of its own, since the same
// serves all ops; whole vectors are written.
template <class T, class A>
[[gnu::noinline]] void bound(const Scale& scale, const T* from, int n, A* to, A* slope) {
  using V = Vec<A>;
  for (int i = 0; i < n; i += kLanes) {
    const V s = n - i >= kLanes ? load(from + i, static_cast<V*>(nullptr))
                                : load_some(from + i, n - i, static_cast<V*>(nullptr));
    const Bounded<V> bounded = scale.bounded(s);
    store(to + i, bounded.s);
    store(slope + i, bounded.slope);
  }
}

// The gradients by these numbers, from those by what the bound left of them.
template <class A>
[[gnu::noinline]] void bound_backward(const Scale& scale, const A* slope, int step, int n,
                                      A* grad) {
  for (int i = 0; i < n; i += kLanes)
    store(grad + i, scale.bounded_backward(load_same(slope + i * step), load_same(grad + i)));
}

template <class Op, class T>
class Loop {
  using A = Accumulate<T>;
  using V = Vec<A>;
  static constexpr Step kStep = Op::step;
  static constexpr int I = kStep.inputs, O = kStep.outputs;
  static constexpr int kBounded = kStep.bounded_input;
  using At = Cursor<I, O>;
  // Where computing takes longer than that, half types are made float32 on the way in and out, so
  // that the formula is compiled once for all of them.
  using S = std::conditional_t<kStep.slow, A, T>;

 public:
  // Units [begin, end). Reduced outputs go to slot `slot`.
  static void run(const Plan& plan, int64_t begin, int64_t end, int64_t slot) {
    Loop loop(plan, slot);
    if (plan.segments > 1) {
      for (int64_t unit = begin; unit < end; ++unit) {
        At at(plan, unit / plan.segments);
        const int64_t first = unit % plan.segments * plan.segment_size;
        const int64_t last = smaller(first + plan.segment_size, plan.inner);
        for (int64_t j = first; j < last; j += kBlock)
          loop.block(at, j, smaller(kBlock, last - j), 1, nullptr);
        loop.end_sum(unit);
      }
      return;
    }
    // Units of whole pieces follow each other; rows of one piece need not even be told apart.
    const bool short_rows = plan.pieces_per_row == 1 && plan.unit_sums;
    At at(plan, first_piece(plan, begin));
    const int64_t most = plan.inner < kBlock ? kBlock / plan.inner : 1;
    for (int64_t unit = begin; unit < end;) {
      int64_t left =
          short_rows ? end - unit : first_piece(plan, unit + 1) - first_piece(plan, unit);
      while (left > 0) {
        const int64_t pieces = smaller(smaller(left, most), at.straight());
        A* sums = short_rows ? static_cast<A*>(plan.unit_sums) + unit : nullptr;
        if (plan.inner <= kBlock)
          loop.block(at, 0, plan.inner, pieces, sums);
        else
          for (int64_t j = 0; j < plan.inner; j += kBlock)
            loop.block(at, j, smaller(kBlock, plan.inner - j), 1, nullptr);
        at.advance(pieces);
        left -= pieces;
        if (short_rows) {
          if (plan.inner > kBlock) loop.end_sum(unit);
          unit += pieces;
        }
      }
      if (!short_rows) loop.end_sum(unit++);
    }
  }

 private:
  Loop(const Plan& plan, int64_t slot) : plan_(plan), slot_(slot) {}

  // Drawing a block's noise takes a start, so longer ones are faster; but memory pauses meanwhile,
  // and where more is read and written shorter turns are (measured from memory, blocks of 512 and
  // 1024: rsample_kl forward 0.71 and 0.68 ns an element, backward 0.75 and 0.84).
  static constexpr int64_t kBlock = kStep.noise && O == 1 ? 1024 : 512;
  static constexpr int kGathered = kBlock + kLanes;

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  static int64_t first_piece(const Plan& plan, int64_t unit) {
    const int64_t row = unit / plan.units_per_row, in_row = unit % plan.units_per_row;
    return row * plan.pieces_per_row + in_row * plan.pieces_per_unit;
  }

  void end_sum(int64_t unit) {
    if (kStep.value && plan_.unit_sums) static_cast<A*>(plan_.unit_sums)[unit] = A(total_);
    total_ = 0;
  }

  template <class From, class To>
  Source<To, V> open(To (&gathered)[kGathered], const Input& input, int64_t offset, int64_t j,
                     int64_t length, int64_t pieces) const {
    if (!input.data) return {nullptr, V(A(input.constant))};
    const int64_t inner = input.layout.inner, outer = At::step(plan_, input.layout);
    const From* from = static_cast<const From*>(input.data) + offset + j * inner;
    if (inner == 0 && (pieces == 1 || outer == 0)) {
      From lanes[kLanes];
      for (From& lane : lanes) lane = *from;
      return {nullptr, load(lanes, static_cast<V*>(nullptr))};
    }
    const bool follow = pieces == 1 || (inner == 1 && outer == length);
    if constexpr (std::is_same_v<From, To>)
      if (follow) return {from, V(0)};
    if (follow) {
      gather(from, length * pieces, gathered);
      return {gathered, V(0)};
    }
    for (int64_t piece = 0; piece < pieces; ++piece, from += outer) {
      To* to = gathered + piece * length;
      if (inner == 1) {
        gather(from, length, to);
        continue;
      }
      // A vector at a time; what is too much is overwritten by the next piece.
      From lanes[kLanes];
      for (From& lane : lanes) lane = *from;
      const V same = load(lanes, static_cast<V*>(nullptr));
      for (int64_t i = 0; i < length; i += kLanes) store(to + i, same);
    }
    return {gathered, V(0)};
  }
  template <class From, class To>
  static void gather(const From* from, int64_t n, To* to) {
    if constexpr (std::is_same_v<From, To>) {
      memcpy(to, from, n * sizeof(To));
    } else {
      int64_t i = 0;
      for (; n - i >= kLanes; i += kLanes) store(to + i, load(from + i, static_cast<V*>(nullptr)));
      if (i < n)
        store_some(to + i, load_some(from + i, int(n - i), static_cast<V*>(nullptr)), int(n - i));
    }
  }

  // Elements [j, j + length) of `pieces` pieces from the cursor on. With `row_sums`, each piece is
  // a row and its sum goes there; else the block's sum is added to `total_`.
  void block(const At& at, int64_t j, int64_t length, int64_t pieces, A* row_sums) {
    const int n = int(length * pieces);
    Elements<Op, S, A> block;
    block.settings = plan_.settings;
    block.n = n;
    for (int k = 0; k < I; ++k)
      block.in[k] = open<T>(in_[k], plan_.input[k], at.offset[At::kInput + k], j, length, pieces);
    if constexpr (kStep.row_grad)
      block.row_grad =
          open<A>(row_grad_, plan_.row_grad, at.offset[At::kRowGrad], j, length, pieces);
    if constexpr (kStep.noise) block.eps = draw(at, j, length, pieces);

    const bool bounded = kBounded > 0 && plan_.settings.scale.bounding != Bounding::none;
    if (bounded) {
      const Source<S, V>& s = block.in[kBounded];
      block.bounded = bounded_;
      block.bounded_step = s.p ? 1 : 0;
      if (!s.p) store(bounded_, s.same);
      if (s.p)
        bound(Scale(plan_.settings), s.p, n, bounded_, slope_);
      else
        bound(Scale(plan_.settings), bounded_, kLanes, bounded_, slope_);
    }

    // Outputs go straight to memory, or to scratch_ to be scattered or reduced from there; so does
    // the gradient that has to go through the bound first.
    for (int k = 0; k < O; ++k) {
      const Output& out = plan_.output[k];
      const bool follows =
          pieces == 1 || (out.layout.inner == 1 && At::step(plan_, out.layout) == length);
      block.direct[k] = nullptr;
      if constexpr (std::is_same_v<S, T>)
        if (out.mode == Mode::full && follows && !(bounded && k == kBounded))
          block.direct[k] = static_cast<T*>(out.data) + at.offset[At::kOutput + k] + j;
      block.scratch[k] = out.mode != Mode::discard ? scratch_[k] : nullptr;
    }
    const bool keep_values = kStep.value && (row_sums || !plan_.unit_sums);
    if (keep_values) block.values = values_;
    V sum;
    if constexpr (kStep.slow) {
      sum = compute_apart(block);
    } else {
      // A copy, as there.
      Elements<Op, S, A> local = block;
      sum = local.compute();
    }

    if constexpr (kStep.value) {
      if (row_sums && length >= kLanes / 2)
        for (int64_t p = 0; p < pieces; ++p)
          row_sums[p] = A(add_lanes<V>(values_ + p * length, length));
      else if (row_sums)
        for (int64_t p = 0; p < pieces; ++p) row_sums[p] = A(add(values_ + p * length, length));
      else if (keep_values)
        scatter(static_cast<A*>(plan_.value.data) + at.offset[At::kValue], plan_.value.layout,
                values_, j, length, pieces);
      else
        total_ += sum_lanes(sum);
    }
    if constexpr (kBounded > 0 && kBounded < O)
      if (bounded && block.scratch[kBounded])
        bound_backward(Scale(plan_.settings), slope_, block.bounded_step, n, scratch_[kBounded]);
    for (int k = 0; k < O; ++k) {
      const Output& out = plan_.output[k];
      if (block.direct[k] || !block.scratch[k]) continue;
      const int64_t offset = at.offset[At::kOutput + k];
      if (out.mode == Mode::full)
        scatter(static_cast<T*>(out.data) + offset, out.layout, scratch_[k], j, length, pieces);
      else
        accumulate(static_cast<double*>(out.data) + slot_ * out.extent + offset, out.layout,
                   scratch_[k], j, length, pieces);
    }
  }

  const float* draw(const At& at, int64_t j, int64_t length, int64_t pieces) {
    const Noise& noise = plan_.noise;
    return fill(noise_, noise,
                {.pieces = pieces,
                 .length = length,
                 .row = at.offset[At::kRow] + j * noise.row.inner,
                 .column = at.offset[At::kColumn] + j * noise.column.inner,
                 .sample = at.offset[At::kSample] + j * noise.sample.inner,
                 .row_step = At::step(plan_, noise.row),
                 .column_step = At::step(plan_, noise.column),
                 .sample_step = At::step(plan_, noise.sample)});
  }

  // Of few numbers: in four chains, for the compiler to make one of vectors.
  static double add(const A* x, int64_t n) {
    double sum[4] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int k = 0; k < 4; ++k) sum[k] += x[i + k];
    for (; i < n; ++i) sum[0] += x[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  // In sixteen lanes of W. What is read beyond the end, inside the buffer, does not count.
  template <class W>
  static double add_lanes(const A* x, int64_t n) {
    W sum(0);
    int64_t i = 0;
    for (; n - i >= kLanes; i += kLanes) sum = sum + load(x + i, static_cast<W*>(nullptr));
    if (i < n) sum = sum + first_lanes(load(x + i, static_cast<W*>(nullptr)), int(n - i));
    return sum_lanes(sum);
  }

  template <class To>
  void scatter(To* to, const Layout& layout, const A* from, int64_t j, int64_t length,
               int64_t pieces) {
    const int64_t outer = At::step(plan_, layout);
    for (int64_t p = 0; p < pieces; ++p, from += length) {
      To* row = to + p * outer + j;
      int64_t i = 0;
      for (; i + kLanes <= length; i += kLanes) store(row + i, load_same(from + i));
      if (i < length)
        store_some(row + i, load_some(from + i, int(length - i), (V*)nullptr), int(length - i));
    }
  }

  void accumulate(double* to, const Layout& layout, const A* from, int64_t j, int64_t length,
                  int64_t pieces) {
    const int64_t outer = At::step(plan_, layout);
    for (int64_t p = 0; p < pieces; ++p, from += length) {
      if (layout.inner == 0)
        to[p * outer] += add_lanes<Vec<double>>(from, length);
      else
        for (int64_t i = 0; i < length; ++i) to[p * outer + j + i] += from[i];
    }
  }

  const Plan& plan_;
  const int64_t slot_;
  double total_ = 0;  // over blocks, whose own sums have at most kBlock / kLanes terms a lane
  alignas(64) S in_[I][kGathered];
  alignas(64) A row_grad_[kGathered];
  alignas(64) A bounded_[kBounded > 0 ? kGathered : 1], slope_[kBounded > 0 ? kGathered : 1];
  alignas(64) float noise_[kStep.noise ? 2 * kBlock + 2 * kNormalsPerStep : 1];
  alignas(64) A values_[kStep.value ? kBlock + kLanes : 1];
  alignas(64) A scratch_[O > 0 ? O : 1][kBlock + kLanes];
};

// One row of the kernel table for each step, one column for each type.
template <class... S>
constexpr Kernel kRows[][kDTypes] = {
    {Loop<S, float>::run, Loop<S, double>::run, Loop<S, bfloat16>::run, Loop<S, float16>::run}...};
template <class... S>
constexpr KernelTable make_table(List<S...>) {
  return {kRows<S...>};
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
