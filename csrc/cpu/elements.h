// The innermost part of the CPU loop: a formula, applied to numbers that lie one after the other,
// sixteen at a time.
#pragma once

#include "../formulas/all.h"
#include "memory.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// Numbers that a block reads: from memory, gathered from it, or one over and over.
template <class S, class V>
struct Source {
  const S* p = nullptr;  // null: `same`, everywhere
  V same;

  V get(int i) const { return p ? load(p + i, static_cast<V*>(nullptr)) : same; }
  // Makes the last `n` < 16 numbers, from i on, a whole vector.
  void pad(int i, int n) {
    if (p) *this = {nullptr, load_some(p + i, n, static_cast<V*>(nullptr))};
  }
};

// The part of the loop that applies the formula: to `n` numbers, which lie one after the other as
// `S`, computed as `A`.
template <class Op, class S, class A>
struct Elements {
  using V = Vec<A>;
  static constexpr Step kStep = Op::step;
  static constexpr int I = kStep.inputs, O = kStep.outputs;
  static constexpr int kBounded = kStep.bounded_input;

  Settings settings;
  int n;
  Source<S, V> in[I];
  Source<A, V> row_grad;
  const float* eps = nullptr;
  const A* bounded = nullptr;  // s within its bound, if it has one
  int bounded_step = 0;
  S* direct[O > 0 ? O : 1];   // where outputs go as they are; null: to `scratch`
  A* scratch[O > 0 ? O : 1];  // null: not wanted
  A* values = nullptr;        // null: they are summed

  // The sum of the values.
  FASTVAE_INLINE V compute() {
    V sum(0);
    const auto vectors = [&]<bool kOneScale, bool kScaleGradient>() __attribute__((always_inline)) {
      const V one_scale =
          kOneScale && bounded ? load_same(bounded) : in[kOneScale ? kStep.scale_input : 0].same;
      for (int i = 0; i < n; i += kLanes) {
        const int m = n - i;
        const bool whole = m >= kLanes;
        if (!whole) {
          for (int k = 0; k < I; ++k) in[k].pad(i, m);
          if constexpr (kStep.row_grad) row_grad.pad(i, m);
        }
        V x[I], y[O > 0 ? O : 1], g(0), e(0);
#pragma GCC unroll 8
        for (int k = 0; k < I; ++k)
          x[k] = kOneScale && k == kStep.scale_input ? one_scale : in[k].get(i);
        if constexpr (kStep.row_grad) g = row_grad.get(i);
        // The noise buffer is longer than the block, so its last vector is always whole.
        if constexpr (kStep.noise) e = load(eps + i, static_cast<V*>(nullptr));
        if (!kOneScale && bounded) x[kBounded] = load_same(bounded + i * bounded_step);
        const V v = Op::apply(settings, x, g, e, y);
        if constexpr (kStep.value) {
          if (values)
            store(values + i, v);
          else
            sum = sum + (whole ? v : first_lanes(v, m));
        }
#pragma GCC unroll 8
        for (int k = 0; k < O; ++k) {
          if (!kScaleGradient && k == kStep.scale_input) continue;
          if (direct[k])
            whole ? store(direct[k] + i, y[k]) : store_some(direct[k] + i, y[k], m);
          else if (scratch[k])
            store(scratch[k] + i, y[k]);
        }
      }
    };
    // The compiler moves what follows from the scale alone out of the loop, and, in float32 (each
    // variant takes seconds to compile), leaves out the gradient of one that is fixed.
    if constexpr (kStep.scale_input > 0) {
      constexpr int kScale = kStep.scale_input, kGradient = kScale < O ? kScale : 0;
      if (in[kScale].p)
        vectors.template operator()<false, true>();
      else if (!std::is_same_v<S, float> ||
               (kScale < O && (direct[kGradient] || scratch[kGradient])))
        vectors.template operator()<true, true>();
      else
        vectors.template operator()<true, false>();
    } else {
      vectors.template operator()<false, true>();
    }
    return sum;
  }
};

// A copy, so that all that the inner loop needs stands in local variables: its stores might change
// others. A function of its own where it is long, for the types that are computed alike.
template <class Op, class S, class A>
[[gnu::noinline]] Vec<A> compute_apart(const Elements<Op, S, A>& elements) {
  Elements<Op, S, A> local = elements;
  return local.compute();
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
