// Every op, by its formula. The kernel tables, the operators of torch.ops.fastvae and what Python
// knows of them follow from this list.
#pragma once

#include "categoricals.h"
#include "colours.h"
#include "counts.h"
#include "gaussian.h"
#include "items.h"
#include "pairs.h"
#include "pixels.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

template <class...>
struct List {};
template <class... A, class... B>
constexpr List<A..., B...> operator+(List<A...>, List<B...>) {
  return {};
}

// The variants of an op, each a struct with `Forward` and `Backward`, by how many operands are
// given.
template <class... Variants>
struct Op {};

// In parts, which for CUDA are compiled apart.
using LatentOps = List<Op<Rsample>, Op<KLDivergence<2>, KLDivergence<4>>, Op<BalancedKLDivergence>,
                       Op<RsampleKL<2>, RsampleKL<4>>, Op<RsampleLogRatio<2>, RsampleLogRatio<4>>>;
using DataOps = List<Op<GaussianLogProb>, Op<BernoulliLogProb>, Op<ContinuousBernoulliLogProb>,
                     Op<LaplaceLogProb>, Op<DiscretizedLogisticLogProb>>;
using CountOps =
    List<Op<PoissonLogProb>, Op<NegativeBinomialLogProb>, Op<ZeroInflatedNegativeBinomialLogProb>>;
using Ops = decltype(LatentOps() + DataOps() + CountOps());

// Those that end in the logarithm of a sum, with loops of their own.
using LogSumOps = List<Op<PairwiseLogProb>, Op<MixtureLogProb>, Op<ChosenLogProb>,
                       Op<MultinomialLogProb>, Op<ColourMixtureLogProb>,
                       Op<BalancedCategoricalKLDivergence>, Op<StraightThroughCategorical>>;

// ---- Steps: what the kernel tables hold ---------------------------------------------------------

// A likelihood's value and gradients in one pass, for a loss that ends there, so that the upstream
// gradient is known already.
template <class Likelihood>
struct WithGradient {
  static constexpr Step step = [] {
    Step both = Likelihood::Backward::step;
    both.value = true;
    return both;
  }();
  template <class S, class V, int I, int O>
  FASTVAE_INLINE static V apply(S settings, const V (&in)[I], V grad_log_prob, V eps, V (&out)[O]) {
    V none[1];
    Likelihood::Backward::apply(settings, in, grad_log_prob, eps, out);
    return Likelihood::Forward::apply(settings, in, grad_log_prob, eps, none);
  }
};

template <class Likelihood>
struct WithGradientOf {
  using type = WithGradient<Likelihood>;
};
template <class Likelihood>  // which has its own
  requires requires { typename Likelihood::Both; }
struct WithGradientOf<Likelihood> {
  using type = typename Likelihood::Both;
};

template <class Variant>
constexpr bool is_likelihood = Variant::Forward::step.value && !Variant::signature.gaussians;

template <class Variant>
constexpr auto steps_of_variant() {
  constexpr List<typename Variant::Forward, typename Variant::Backward> both;
  if constexpr (is_likelihood<Variant>)
    return both + List<typename WithGradientOf<Variant>::type>();
  else
    return both;
}
template <class... Variants>
constexpr auto steps_of_op(Op<Variants...>) {
  return (steps_of_variant<Variants>() + ...);
}
template <class... O>
constexpr auto steps_of(List<O...>) {
  return (steps_of_op(O()) + ...);
}

template <class O>
using StepsOf = decltype(steps_of(O()));
// Every step, in the order of the kernel tables.
using Steps = StepsOf<Ops>;

// The position of a step in the kernel tables.
template <class S, class... All>
constexpr int index_in(List<All...>) {
  int index = -1, i = 0;
  ((index = std::is_same_v<S, All> ? i : index, ++i), ...);
  return index;
}
template <class S>
constexpr int index_of = index_in<S>(Steps());

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
