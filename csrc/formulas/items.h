// Rows of logits: what one chosen item, or how often each was chosen, is worth (../items.h).
#pragma once

#include "../signature.h"
#include "log_sums.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

struct ChosenLogProb {
  static constexpr Signature signature{.name = "chosen_log_prob",
                                       .operands = {"x", "logits"},
                                       .value = "log_prob",
                                       .loop = Loop::items};
};
struct MultinomialLogProb {
  static constexpr Signature signature{.name = "multinomial_log_prob",
                                       .operands = {"x", "logits"},
                                       .value = "log_prob",
                                       .loop = Loop::items};
};

// ln p = l - ln sum, of a sum that has more digits than l.
template <class V>
FASTVAE_INLINE V log_p(V l, double log_sum) {
  using R = Real<V>;
  const R high = R(log_sum);
  return (l - V(high)) - V(R(log_sum - double(high)));
}
template <class V>
FASTVAE_INLINE V probability(V l, double log_sum) {
  return share_of_all(log_p(l, log_sum), V(0));
}

// The same, but 0 for an item that never was and has no probability: the derivative by its count.
template <class V>
FASTVAE_INLINE V log_p_of(V count, V l, double log_sum) {
  const V of_item = log_p(l, log_sum);
  const auto never = (count == V(0)) & (of_item == V(-Constants<Real<V>>::infinity));
  return select(never, V(0), of_item);
}
template <class V>
FASTVAE_INLINE V add_log_prob(V sum, V count, V l, double log_sum) {
  return fma(count, log_p_of(count, l, log_sum), sum);
}

// The same relative to something else than ln sum, which all terms are missing then; also what
// terms are missing that were relative to `l`.
template <class V>
FASTVAE_INLINE V add_relative(V sum, V count, V l, V shift) {
  return sum + select(count == V(0), V(0), count * (l - shift));
}
// The value, of terms and of a sum of exponentials that are relative to the same.
template <class V>
FASTVAE_INLINE V value_of_relative(V terms, V count, V sum) {
  return terms - count * log(sum);
}

// By l: x - n p times the upstream gradient, of which `own` is x times it and `all` -n times it.
template <class V>
FASTVAE_INLINE V gradient_of_logit(V l, double log_sum, V all, V own) {
  return fma(probability(l, log_sum), all, own);
}
// By that of the one chosen item: 1 - p times it.
template <class V>
FASTVAE_INLINE V gradient_of_chosen(V l, double log_sum, V grad) {
  return grad * (V(1) - probability(l, log_sum));
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
