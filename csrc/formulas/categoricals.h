// Groups of classes (../categoricals.h): samples, and KL divergences between two of them.
//
// What a word draws must not depend on the order in which classes are summed. So the weight of each
// relative to the largest, in float32 for all types but float64, is rounded to a multiple of a
// power of two that is small enough that all sums are exact.
//
// With q and p the mixed probabilities of a class, d = ln(p / q) and w = (p - q) / p,
//
//     KL(q || p) = sum of q (p/q - 1 - ln(p/q))
//     d KL / d logit of q = (1 - u) s_q (-d + sum of s_q d)
//     d KL / d logit of p = (1 - u) s_p (w - sum of s_p w)
//
// where s are the probabilities before the mixing, and no term of the first sum is below 0.
// Where q and p are near, d and p - q are small differences; they are made of e^t - 1, which has
// all its digits. The sums of the gradients are taken relative to the largest class, which may have
// nearly all of the probability: its own gradient is what is left by the others.
#pragma once

#include "../signature.h"
#include "log_sums.h"
#include "philox.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

struct StraightThroughCategorical {
  static constexpr Signature signature{.name = "straight_through_categorical",
                                       .operands = {"logits"},
                                       .draws = true,
                                       .loop = Loop::categoricals};
};
struct BalancedCategoricalKLDivergence {
  static constexpr Signature signature{.name = "balanced_categorical_kl_divergence",
                                       .operands = {"logits", "prior_logits"},
                                       .value = "kl",
                                       .balances = true,
                                       .loop = Loop::categoricals};
};

// ---- Samples ------------------------------------------------------------------------------------

// Added to a number from 0 to 1 and taken away again, it rounds that to a multiple of 2^-52 times
// itself; so many numbers as there are classes then have a sum that is exact.
FASTVAE_INLINE double grid_of(int64_t classes) {
  double grid = 2;
  while (grid < double(classes)) grid *= 2;
  return grid;
}
template <class V>
FASTVAE_INLINE V on_grid(V weight, V grid) {
  return (weight + grid) - grid;
}

// What a word draws: one of all classes alike, or the one in whose part of the weights, one behind
// the other, this share of their sum lies.
struct Draw {
  int64_t of_all = -1;
  double share;

  FASTVAE_INLINE Draw(uint32_t word, double uniform, int64_t classes) {
    const double within = (double(word) + 0.5) * 0x1p-32;
    share = (within - uniform) / (1 - uniform);
    if (within >= uniform) return;
    of_all = int64_t(within / uniform * double(classes));
    if (of_all >= classes) of_all = classes - 1;
  }
};

// s (g - sum of s g), the gradient by a logit, where g is that by the probability s; g and `all`,
// the sum of pull(), relative to g of the largest class.
template <class V>
FASTVAE_INLINE V pull(V s, V g, V largest) {
  return select(s == V(0), V(0), s * (g - largest));
}
template <class V>
FASTVAE_INLINE V softmax_gradient(V s, V g, V largest, V all) {
  return pull(s, g, largest) - s * all;
}

// ---- KL divergence ------------------------------------------------------------------------------

// (1 - u) s + u / classes
template <class R>
struct Mixing {
  R kept, each;

  FASTVAE_INLINE Mixing(double uniform, int64_t classes)
      : kept(R(1 - uniform)), each(R(uniform / double(classes))) {}
  template <class V>
  FASTVAE_INLINE V operator()(V share) const {
    return fma(V(kept), share, V(each));
  }
};

// What of a row's upstream gradient comes to q's logits and to p's, but for the uniform part.
template <class V>
struct BalancedUpstream {
  V q, p;

  FASTVAE_INLINE BalancedUpstream(Real<V> grad, double balance)
      : q(-grad * Real<V>(1 - balance)), p(grad * Real<V>(balance)) {}
};
// The factor of it that all of a row's classes have: none if the row is below the free nats.
template <class R>
FASTVAE_INLINE R factor_of_row(R value, R free_nats, const Mixing<R>& mixing) {
  return free_nats > 0 && value < free_nats ? R(0) : mixing.kept;
}

// a - b, and what is lost by rounding it (Knuth, The Art of Computer Programming 2, 4.2.2); 0 where
// that is infinite.
template <class V>
struct Difference {
  V rounded, rest;

  Difference() = default;
  FASTVAE_INLINE Difference(V a, V b) : rounded(a - b) {
    const V back = rounded - a;
    rest = (a - (rounded - back)) - (b + back);
    rest = select(rest == rest, rest, V(0));
  }
};

// A class of two groups: its exponentials relative to those of the largest, or its probabilities
// before the mixing.
template <class V>
struct ClassOfTwo {
  V q, p;
  V log_ratio;   // ln(p / q)
  V difference;  // p - q
};

// The sums over all classes.
struct SumsOfTwo {
  double q = 0, p = 0, difference = 0;
};

// Two groups: what makes exponentials of their logits, and of these probabilities.
template <class R>
struct TwoGroups {
  R largest_q = 0, largest_p = 0;
  Difference<R> shift;
  R inverse_q = 0, inverse_p = 0, growth = 0, log_growth = 0;  // of the sums

  TwoGroups() = default;
  FASTVAE_INLINE TwoGroups(R q, R p)
      : largest_q(shift_of(q)), largest_p(shift_of(p)), shift(largest_p, largest_q) {}

  template <class V>
  FASTVAE_INLINE ClassOfTwo<V> exponentials(V logit, V prior_logit) const {
    const Difference<V> apart(prior_logit, logit);
    const V log_ratio = (apart.rounded - V(shift.rounded)) + (apart.rest - V(shift.rest));
    const V q = share(logit, V(largest_q)), p = share(prior_logit, V(largest_p));
    return {q, p, log_ratio, select(log_ratio < V(1), q * exp(log_ratio).expm1, p - q)};
  }

  FASTVAE_INLINE void normalize(const SumsOfTwo& sums) {
    inverse_q = R(1) / R(sums.q);
    inverse_p = R(1) / R(sums.p);
    growth = R(sums.difference);
    const R ratio = R(sums.p) * inverse_q;
    log_growth = ratio > 0 ? log_of_ratio(growth * inverse_q, ratio) : Constants<R>::nan;
  }

  template <class V>
  FASTVAE_INLINE ClassOfTwo<V> probabilities(const ClassOfTwo<V>& e) const {
    const V q = e.q * V(inverse_q);
    return {q, e.p * V(inverse_p), e.log_ratio - V(log_growth),
            (e.difference - q * V(growth)) * V(inverse_p)};
  }
};

// Of a class, by its probabilities before the mixing; where there is none, without.
template <bool kMixed>
struct CategoricalKL {
  template <class V>
  FASTVAE_INLINE static V value(const ClassOfTwo<V>& c, const Mixing<Real<V>>& mixing) {
    if constexpr (kMixed) {
      const V q = mixing(c.q), inverse = V(1) / q;
      return q * log_deviance(V(mixing.kept) * c.difference * inverse, mixing(c.p) * inverse);
    } else {
      const V infinity(Constants<Real<V>>::infinity);
      const V far = c.difference - c.q * c.log_ratio;
      const V y = select(c.log_ratio < V(1), c.q * exp(c.log_ratio).tail, far);
      // A class that q never has costs nothing; one that only p never has costs all.
      return select(c.log_ratio == V(0) - infinity, infinity, select(c.q == V(0), c.p, y));
    }
  }

  // What the gradients by the logits of q and of p are made of: ln(p / q), and (p - q) / p or,
  // where nothing is mixed, p - q itself, which is the gradient then.
  template <class V>
  FASTVAE_INLINE static V of_q(const ClassOfTwo<V>& c, const Mixing<Real<V>>& mixing) {
    if constexpr (!kMixed) return c.log_ratio;
    const V inverse = V(1) / mixing(c.q);
    return log_of_ratio(V(mixing.kept) * c.difference * inverse, mixing(c.p) * inverse);
  }
  template <class V>
  FASTVAE_INLINE static V of_p(const ClassOfTwo<V>& c, const Mixing<Real<V>>& mixing) {
    if constexpr (!kMixed) return c.difference;
    return V(mixing.kept) * c.difference / mixing(c.p);
  }

  template <class V>
  FASTVAE_INLINE static V gradient_of_p(V p, V of_p, V largest, V all) {
    return kMixed ? softmax_gradient(p, of_p, largest, all) : of_p;
  }
};
}  // namespace FASTVAE_TARGET
}  // namespace fastvae
