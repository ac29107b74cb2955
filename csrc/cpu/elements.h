// The innermost part of the CPU loop: a formula, applied to numbers that lie one after the other, a
// short vector at a time. It knows nothing of layouts and half types, so that each formula is
// compiled for float32 and float64 alone, and the loop around it once for all formulas.
#pragma once

#include <type_traits>

#include "../formulas/all.h"
#include "memory.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

// Numbers that a block reads: from memory, or the first sixteen there, all equal, over and over.
template <class A>
struct Source {
  const A* p = nullptr;
  bool same = false;
};

// What a formula is applied to: `n` numbers.
template <class A>
struct Elements {
  const Settings* settings;
  int n;
  Source<A> in[kMaxInputs];
  Source<A> row_grad;
  const float* eps = nullptr;
  A* out[kMaxOutputs];  // null: not wanted
  A* values = nullptr;  // null: they are summed
};

// The sum of the values.
template <class A>
using Compute = Vec<A> (*)(const Elements<A>& elements);

template <class Op, class A>
class Formula {
  using V = ShortVec<A>;
  static constexpr Step kStep = Op::step;
  static constexpr int I = kStep.inputs, O = kStep.outputs, kScale = kStep.scale_input;
  static constexpr int kOut = O > 0 ? O : 1, kSize = V::kSize;

 public:
  static Vec<A> compute(const Elements<A>& elements) {
    if constexpr (kScale == 0) {
      return vectors<false, true>(elements);
    } else {
      // The compiler moves what follows from the scale alone out of the loop, and leaves out the
      // gradient of one that is fixed.
      if (!elements.in[kScale].same) return vectors<false, true>(elements);
      if (kScale < O && elements.out[kScale < O ? kScale : 0]) return vectors<true, true>(elements);
      return vectors<true, false>(elements);
    }
  }

 private:
  // Where numbers are the same everywhere, `mask` is 0 and keeps the place.
  struct Place {
    const A* p;
    int64_t mask;

    Place() = default;
    FASTVAE_INLINE Place(const Source<A>& source) : p(source.p), mask(source.same ? 0 : -1) {}
    FASTVAE_INLINE V load(int64_t i) const { return load_same<kSize>(p + (i & mask)); }
    // Makes the last `n` numbers, from i on, a whole vector.
    FASTVAE_INLINE void pad(int64_t i, int n, A (&padded)[kSize]) {
      store_same(padded, load_some(p + (i & mask), n, static_cast<V*>(nullptr)));
      *this = {padded, 0};
    }
    FASTVAE_INLINE Place(const A* p, int64_t mask) : p(p), mask(mask) {}
  };

  FASTVAE_INLINE static void add(V v, typename V::Register* sum) {
    repeat<V::kCount>([&](int i) __attribute__((always_inline)) { sum[i] = sum[i] + v.r[i]; });
  }

  template <bool kOneScale, bool kScaleGradient>
  static Vec<A> vectors(const Elements<A>& elements) {
    // Copies, so that all that the loop needs stands in local variables: its stores might change
    // others.
    const Settings settings = *elements.settings;
    const int64_t n = elements.n;
    Place in[I], row_grad;
    repeat<I>([&](int k) __attribute__((always_inline)) { in[k] = elements.in[k]; });
    if constexpr (kStep.row_grad) row_grad = elements.row_grad;
    const float* const eps = elements.eps;
    A* const values = elements.values;
    A* out[kOut];
    repeat<O>([&](int k) __attribute__((always_inline)) { out[k] = elements.out[k]; });
    V one_scale(0);
    if constexpr (kOneScale) one_scale = in[kScale].load(0);

    A padded[I + 1][kSize];
    Vec<A> sum(0);
    int place = 0;  // in the sum
    for (int64_t i = 0; i < n; i += kSize) {
      const int left = int(n - i);
      const bool whole = left >= kSize;
      if (!whole) {
        repeat<I>([&](int k) __attribute__((always_inline)) { in[k].pad(i, left, padded[k]); });
        if constexpr (kStep.row_grad) row_grad.pad(i, left, padded[I]);
      }
      V x[I], y[kOut], g(0), e(0);
      repeat<I>([&](int k) __attribute__((always_inline)) {
        x[k] = kOneScale && k == kScale ? one_scale : in[k].load(i);
      });
      if constexpr (kStep.row_grad) g = row_grad.load(i);
      // The noise buffer is longer than the block, so its last vector is always whole.
      if constexpr (kStep.noise) e = load(eps + i, static_cast<V*>(nullptr));
      const V v = Op::apply(settings, x, g, e, y);
      if constexpr (kStep.value) {
        if (values)
          store_same(values + i, v);
        else
          add(whole ? v : first_lanes(v, left), sum.r + place);
        place = (place + V::kCount) % Vec<A>::kCount;
      }
      repeat<O>([&](int k) __attribute__((always_inline)) {
        if ((!kScaleGradient && k == kScale) || !out[k]) return;
        whole ? store_same(out[k] + i, y[k]) : store_some(out[k] + i, y[k], left);
      });
    }
    return sum;
  }
};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
