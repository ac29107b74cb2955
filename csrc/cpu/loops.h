// The CPU loop: a map over elements, with the value summed over rows.
//
// Every op runs through `run`. It walks its units block by block; a block is part of a long piece
// or several whole short ones, at most 1024 elements. A block's noise is drawn into a buffer that
// stays in the first-level cache, operands whose pieces do not follow each other in memory, or that
// are of a half type, are gathered into one, and then the op's formula is applied to the block
// (elements.h). It is called by its address, once a block, so that this loop is compiled once for
// each type, and not for each op.
#pragma once

#include "../formulas/weights.h"
#include "../plan.h"
#include "elements.h"
#include "kernels.h"
#include "noise.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// Offsets of every operand at the current piece, advanced by addition.
struct Cursor {
  enum Slot {
    kRowGrad,
    kWeight,
    kValue,
    kRow,
    kColumn,
    kSample,
    kInput,
    kMost = kInput + kMaxInputs
  };

  const Plan& plan;
  const int outputs, count;
  const Layout* layout[kMost + kMaxOutputs];
  int64_t offset[kMost + kMaxOutputs] = {};
  int64_t index[kMaxDims];

  Cursor(const Step& step, const Plan& p, int64_t piece)
      : plan(p), outputs(kInput + step.inputs), count(outputs + step.outputs) {
    layout[kRowGrad] = &p.row_grad.layout;
    layout[kWeight] = &p.weight.layout;
    layout[kValue] = &p.value.layout;
    layout[kRow] = &p.noise.row;
    layout[kColumn] = &p.noise.column;
    layout[kSample] = &p.noise.sample;
    for (int k = 0; k < step.inputs; ++k) layout[kInput + k] = &p.input[k].layout;
    for (int k = 0; k < step.outputs; ++k) layout[outputs + k] = &p.output[k].layout;
    for (int d = p.dims - 1; d >= 0; --d) {
      index[d] = piece % p.size[d];
      piece /= p.size[d];
      for (int k = 0; k < count; ++k) offset[k] += index[d] * layout[k]->stride[d];
    }
  }

  int64_t input(int k) const { return offset[kInput + k]; }
  int64_t output(int k) const { return offset[outputs + k]; }

  // Pieces from here on that one step along the last outer dimension leads through.
  int64_t straight() const {
    return plan.dims ? plan.size[plan.dims - 1] - index[plan.dims - 1] : 1;
  }
  static int64_t step(const Plan& plan, const Layout& layout) {
    return plan.dims ? layout.stride[plan.dims - 1] : 0;
  }

  // On by `pieces`, at most straight().
  void advance(int64_t pieces) {
    for (int d = plan.dims - 1; d >= 0; --d) {
      index[d] += pieces;
      const bool carry = index[d] == plan.size[d];
      const int64_t step = carry ? pieces - plan.size[d] : pieces;
      for (int k = 0; k < count; ++k) offset[k] += step * layout[k]->stride[d];
      if (!carry) return;
      index[d] = 0;
      pieces = 1;
    }
  }
};

// `n` numbers within the scale's bound, and the slopes; whole vectors are written.
template <class A>
void bound(const Scale& scale, const A* from, int n, A* to, A* slope) {
  using V = ShortVec<A>;
  for (int i = 0; i < n; i += V::kSize) {
    const V s = n - i >= V::kSize ? load(from + i, static_cast<V*>(nullptr))
                                  : load_some(from + i, n - i, static_cast<V*>(nullptr));
    const Bounded<V> bounded = scale.bounded(s);
    store(to + i, bounded.s);
    store(slope + i, bounded.slope);
  }
}

// The gradients by these numbers, from those by what the bound left of them.
template <class A>
void bound_backward(const Scale& scale, const A* slope, bool same, int n, A* grad) {
  using V = ShortVec<A>;
  for (int i = 0; i < n; i += V::kSize) {
    const V slopes = load(slope + (same ? 0 : i), static_cast<V*>(nullptr));
    store(grad + i, scale.bounded_backward(slopes, load(grad + i, static_cast<V*>(nullptr))));
  }
}

// f of each of `n` weights and numbers; `to` may be where the numbers lie.
template <class A, class F>
void weigh(Source<A> weight, Source<A> x, int n, A* to, const F& f) {
  using V = Vec<A>;
  const auto read = [n](Source<A> from, int i) {
    const A* p = from.p + (from.same ? 0 : i);
    return from.same || n - i >= kLanes ? load(p, static_cast<V*>(nullptr))
                                        : load_some(p, n - i, static_cast<V*>(nullptr));
  };
  for (int i = 0; i < n; i += kLanes) {
    const V y = f(read(weight, i), read(x, i));
    n - i >= kLanes ? store(to + i, y) : store_some(to + i, y, n - i);
  }
}

template <class T>
class Loop {
  using A = Accumulate<T>;
  using V = Vec<A>;

 public:
  // Units [begin, end). Reduced outputs go to slot `slot`.
  static void run(const Step& step, Compute<A> compute, const Plan& plan, int64_t begin,
                  int64_t end, int64_t slot) {
    Loop loop(step, compute, plan, slot);
    const int64_t block = loop.block_;
    if (plan.segments > 1) {
      for (int64_t unit = begin; unit < end; ++unit) {
        Cursor at(step, plan, unit / plan.segments);
        const int64_t first = unit % plan.segments * plan.segment_size;
        const int64_t last = smaller(first + plan.segment_size, plan.inner);
        for (int64_t j = first; j < last; j += block)
          loop.run_block(at, j, smaller(block, last - j), 1, nullptr);
        loop.end_sum(unit);
      }
      return;
    }
    // Units of whole pieces follow each other; rows of one piece need not even be told apart.
    const bool short_rows = plan.pieces_per_row == 1 && plan.unit_sums;
    Cursor at(step, plan, first_piece(plan, begin));
    const int64_t most = plan.inner < block ? block / plan.inner : 1;
    for (int64_t unit = begin; unit < end;) {
      int64_t left =
          short_rows ? end - unit : first_piece(plan, unit + 1) - first_piece(plan, unit);
      while (left > 0) {
        const int64_t pieces = smaller(smaller(left, most), at.straight());
        A* sums = short_rows ? static_cast<A*>(plan.unit_sums) + unit : nullptr;
        if (plan.inner <= block)
          loop.run_block(at, 0, plan.inner, pieces, sums);
        else
          for (int64_t j = 0; j < plan.inner; j += block)
            loop.run_block(at, j, smaller(block, plan.inner - j), 1, nullptr);
        at.advance(pieces);
        left -= pieces;
        if (short_rows) {
          if (plan.inner > block) loop.end_sum(unit);
          unit += pieces;
        }
      }
      if (!short_rows) loop.end_sum(unit++);
    }
  }

 private:
  // Drawing a block's noise takes a start, so longer ones are faster; but memory pauses meanwhile,
  // and where more is read and written shorter turns are (measured from memory, blocks of 512 and
  // 1024: rsample_kl forward 0.71 and 0.68 ns an element, backward 0.75 and 0.84).
  static constexpr int64_t kShort = 512, kLong = 1024;

  Loop(const Step& step, Compute<A> compute, const Plan& plan, int64_t slot)
      : step_(step),
        compute_(compute),
        plan_(plan),
        slot_(slot),
        block_(step.noise && step.outputs == 1 ? kLong : kShort),
        bounded_input_(plan.settings.scale.bounding == Bounding::none ? 0 : step.bounded_input) {
    A* next = buffers_;
    const auto buffer = [&] {
      A* const p = next;
      next += block_ + kLanes;
      return p;
    };
    for (int k = 0; k < step.inputs; ++k) in_[k] = buffer();
    for (int k = 0; k < step.outputs; ++k) scratch_[k] = buffer();
    if (step.row_grad) row_grad_ = buffer();
    if (step.value) values_ = buffer();
    if (bounded_input_) bounded_ = buffer(), slope_ = buffer();
    if (plan.weight.data) weight_ = buffer(), weighted_grad_ = buffer();
  }

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  static int64_t first_piece(const Plan& plan, int64_t unit) {
    const int64_t row = unit / plan.units_per_row, in_row = unit % plan.units_per_row;
    return row * plan.pieces_per_row + in_row * plan.pieces_per_unit;
  }

  void end_sum(int64_t unit) {
    if (step_.value && plan_.unit_sums) static_cast<A*>(plan_.unit_sums)[unit] = A(total_);
    total_ = 0;
  }

  template <class From>
  Source<A> open(A* gathered, const Input& input, int64_t offset, int64_t j, int64_t length,
                 int64_t pieces) const {
    if (!input.data) {
      store(gathered, V(A(input.constant)));
      return {gathered, true};
    }
    const int64_t inner = input.layout.inner, outer = Cursor::step(plan_, input.layout);
    const From* from = static_cast<const From*>(input.data) + offset + j * inner;
    if (inner == 0 && (pieces == 1 || outer == 0)) {
      store(gathered, load_everywhere(from));
      return {gathered, true};
    }
    const bool follow = pieces == 1 || (inner == 1 && outer == length);
    if constexpr (std::is_same_v<From, A>)
      if (follow) return {from, false};
    if (follow) {
      gather(from, length * pieces, gathered);
      return {gathered, false};
    }
    for (int64_t piece = 0; piece < pieces; ++piece, from += outer) {
      A* to = gathered + piece * length;
      if (inner == 1) {
        gather(from, length, to);
        continue;
      }
      // A vector at a time; what is too much is overwritten by the next piece.
      const V same = load_everywhere(from);
      for (int64_t i = 0; i < length; i += kLanes) store(to + i, same);
    }
    return {gathered, false};
  }
  template <class From>
  static V load_everywhere(const From* from) {
    From lanes[kLanes];
    for (From& lane : lanes) lane = *from;
    return load(lanes, static_cast<V*>(nullptr));
  }
  template <class From>
  static void gather(const From* from, int64_t n, A* to) {
    if constexpr (std::is_same_v<From, A>) {
      memcpy(to, from, n * sizeof(A));
    } else {
      int64_t i = 0;
      for (; n - i >= kLanes; i += kLanes) store(to + i, load(from + i, static_cast<V*>(nullptr)));
      if (i < n) store_some(to + i, load_some(from + i, int(n - i), (V*)nullptr), int(n - i));
    }
  }

  // Elements [j, j + length) of `pieces` pieces from the cursor on. With `row_sums`, each piece is
  // a row and its sum goes there; else the block's sum is added to `total_`.
  void run_block(const Cursor& at, int64_t j, int64_t length, int64_t pieces, A* row_sums) {
    const int n = int(length * pieces);
    Elements<A> block;
    block.settings = &plan_.settings;
    block.n = n;
    for (int k = 0; k < step_.inputs; ++k)
      block.in[k] = open<T>(in_[k], plan_.input[k], at.input(k), j, length, pieces);
    if (step_.row_grad)
      block.row_grad =
          open<A>(row_grad_, plan_.row_grad, at.offset[Cursor::kRowGrad], j, length, pieces);
    Source<A> weight;
    if (weight_) {
      weight = open<A>(weight_, plan_.weight, at.offset[Cursor::kWeight], j, length, pieces);
      if (step_.row_grad) {
        weigh(weight, block.row_grad, n, weighted_grad_, [](V w, V grad) { return w * grad; });
        block.row_grad = {weighted_grad_, false};
      }
    }
    if (step_.noise) block.eps = draw(at, j, length, pieces);
    if (bounded_input_) {
      Source<A>& s = block.in[bounded_input_];
      bound(Scale(plan_.settings), s.p, s.same ? kLanes : n, bounded_, slope_);
      s.p = bounded_;
    }

    // Outputs go straight to memory, or to scratch_ to be scattered or reduced from there; so does
    // the gradient that has to go through the bound first.
    bool direct[kMaxOutputs];
    for (int k = 0; k < step_.outputs; ++k) {
      const Output& out = plan_.output[k];
      direct[k] = std::is_same_v<T, A> && out.mode == Mode::full &&
                  follows(out.layout, length, pieces) && !(bounded_input_ && k == bounded_input_);
      block.out[k] = out.mode == Mode::discard ? nullptr : scratch_[k];
      if (direct[k]) block.out[k] = static_cast<A*>(out.data) + at.output(k) + j;
    }
    const bool keep_values = step_.value && (row_sums || !plan_.unit_sums || weight_);
    if (keep_values) block.values = values_;
    const V sum = compute_(block);
    if (weight_ && keep_values)
      weigh(weight, {values_, false}, n, values_, [](V w, V v) { return weighted(w, v); });

    if (step_.value && row_sums)
      for (int64_t p = 0; p < pieces; ++p)
        row_sums[p] = A(length >= kLanes / 2 ? add_lanes<V>(values_ + p * length, length)
                                             : add(values_ + p * length, length));
    else if (keep_values && plan_.unit_sums)
      total_ += add_lanes<V>(values_, n);
    else if (keep_values)
      scatter(static_cast<A*>(plan_.value.data) + at.offset[Cursor::kValue], plan_.value.layout,
              values_, j, length, pieces);
    else if (step_.value)
      total_ += sum_lanes(sum);
    for (int k = 0; k < step_.outputs; ++k) {
      const Output& out = plan_.output[k];
      A* const grad = block.out[k];
      if (!grad) continue;
      if (bounded_input_ && k == bounded_input_)
        bound_backward(Scale(plan_.settings), slope_, block.in[k].same, n, grad);
      if (weight_ && step_.row_grad)  // z is no gradient
        weigh(weight, {grad, false}, n, grad, [](V w, V g) { return weighted_backward(w, g); });
      if (direct[k]) continue;
      if (out.mode == Mode::full)
        scatter(static_cast<T*>(out.data) + at.output(k), out.layout, scratch_[k], j, length,
                pieces);
      else
        accumulate(static_cast<double*>(out.data) + slot_ * out.extent + at.output(k), out.layout,
                   scratch_[k], j, length, pieces);
    }
  }

  // Whether the pieces of an output follow each other.
  bool follows(const Layout& layout, int64_t length, int64_t pieces) const {
    return pieces == 1 || (layout.inner == 1 && Cursor::step(plan_, layout) == length);
  }

  const float* draw(const Cursor& at, int64_t j, int64_t length, int64_t pieces) {
    const Noise& noise = plan_.noise;
    return fill(noise_, noise,
                {.pieces = pieces,
                 .length = length,
                 .row = at.offset[Cursor::kRow] + j * noise.row.inner,
                 .column = at.offset[Cursor::kColumn] + j * noise.column.inner,
                 .sample = at.offset[Cursor::kSample] + j * noise.sample.inner,
                 .row_step = Cursor::step(plan_, noise.row),
                 .column_step = Cursor::step(plan_, noise.column),
                 .sample_step = Cursor::step(plan_, noise.sample)});
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
    const int64_t outer = Cursor::step(plan_, layout);
    if (follows(layout, length, pieces)) length *= pieces, pieces = 1;
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
    const int64_t outer = Cursor::step(plan_, layout);
    for (int64_t p = 0; p < pieces; ++p, from += length) {
      if (layout.inner == 0)
        to[p * outer] += add_lanes<Vec<double>>(from, length);
      else
        for (int64_t i = 0; i < length; ++i) to[p * outer + j + i] += from[i];
    }
  }

  const Step& step_;
  const Compute<A> compute_;
  const Plan& plan_;
  const int64_t slot_, block_;
  const int bounded_input_;
  double total_ = 0;  // over blocks, whose own sums have at most block_ / kLanes terms a lane
  A *in_[kMaxInputs], *scratch_[kMaxOutputs];
  A *row_grad_ = nullptr, *values_ = nullptr, *bounded_ = nullptr, *slope_ = nullptr;
  A *weight_ = nullptr, *weighted_grad_ = nullptr;
  alignas(64) float noise_[2 * kLong + 2 * kNormalsPerStep];
  alignas(64) A buffers_[(kMaxInputs + kMaxOutputs + 6) * (kLong + kLanes)];
};

template <class Op, class T>
void run(const Plan& plan, int64_t begin, int64_t end, int64_t slot) {
  static constexpr Step step = Op::step;
  Loop<T>::run(step, Formula<Op, Accumulate<T>>::compute, plan, begin, end, slot);
}

// One row of the kernel table for each step, one column for each type.
template <class... S>
constexpr Kernel kRows[][kDTypes] = {
    {run<S, float>, run<S, double>, run<S, bfloat16>, run<S, float16>}...};
template <class... S>
constexpr KernelTable make_table(List<S...>) {
  return {kRows<S...>};
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
