// What an op's signature and its steps say together, as one table of plain data for all ops. No
// torch.
//
// Every operator takes its arguments in one order: the upstream gradients of z and of the value (in
// `_backward` and `_with_grad`), the operands, what forward kept for backward, the seed, the weight
// of what is summed, and the settings of for_each_setting().
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../dims.h"
#include "../formulas/all.h"

namespace fastvae {

// What computes a pass: a row of the kernel tables and what it reads and gives.
struct Kernels {
  int index = -1;  // none
  Step step{};
};

// An op with so many operands.
struct Variant {
  int operands = 0;
  Kernels forward, backward, with_gradient;
  Kernels without_z, without_value;  // backward where one upstream gradient is missing
};

struct Declaration {
  Signature signature{};
  int operands = 0;                   // at most
  bool noise = false;                 // takes a seed
  bool z = false;                     // returns a sample
  bool scale_form = false;            // takes `param` and `bound`
  std::array<Variant, 2> variants{};  // by ascending number of operands

  constexpr bool value() const { return signature.value; }
  constexpr bool sums() const {
    return value() && signature.loop == Loop::map;
  }  // takes `weight` and `event_ndim`
  constexpr bool counts() const { return signature.rates[0]; }  // takes `param`
  // Whether operand `k` may be left out.
  constexpr bool is_optional(int k) const {
    if (signature.gaussians) return k > 0;
    return (signature.number || signature.optional) && k == operands - 1;
  }
  constexpr bool has_loss() const { return variants[0].with_gradient.index >= 0; }
  const Variant& variant(int given) const {
    return variants[1].operands == given ? variants[1] : variants[0];
  }
};

enum class Direction { forward, backward, with_gradient };
constexpr int kDirections = 3;

using OptionalBound = std::optional<std::vector<double>>;

// A call's arguments that are no tensors.
struct Arguments {
  double number = 0, balance = 0, uniform_mix = 0, free_nats = 0;
  int64_t param = 0, packed_dim = -1;
  int64_t components = 0;
  int64_t bins = 0;
  double low = 0, high = 0, least_log_scale = 0;
  int64_t event_ndim = -1;  // -1: nothing is summed
  Dims sample_shape;
  bool path_derivative = false;
  bool marginals = false;
  double log_own = 0, log_other = 0;  // of a row with the component of its number, with others
  double grad_value = 0;              // of every row, where no tensor says
  int64_t needs = 0;                  // bit i: the gradient of operand i is wanted
  OptionalBound bound;
};

// Calls f(name, value) for each setting that an op takes, in their order.
template <class A, class F>  // A: Arguments, const or not
void for_each_setting(const Declaration& op, Direction direction, A& a, const F& f) {
  if (op.signature.number) f(op.signature.number, a.number);
  if (op.signature.balances) f("balance", a.balance);
  if (op.scale_form || op.counts() || op.signature.loop == Loop::pairs) f("param", a.param);
  if (op.signature.weighs) {
    f("marginals", a.marginals);
    f("log_own", a.log_own);
    f("log_other", a.log_other);
  }
  if (op.signature.gaussians) f("packed_dim", a.packed_dim);
  if (op.signature.loop == Loop::colours) {
    f("components", a.components);
    f("least_log_scale", a.least_log_scale);
  }
  if (op.signature.levels) {
    f("bins", a.bins);
    f("low", a.low);
    f("high", a.high);
  }
  const bool categoricals = op.signature.loop == Loop::categoricals;
  if (categoricals) f("uniform_mix", a.uniform_mix);
  if (categoricals && op.value()) f("free_nats", a.free_nats);
  if (op.sums() || (categoricals && op.value())) f("event_ndim", a.event_ndim);
  if (op.signature.samples) f("sample_shape", a.sample_shape);
  if (op.signature.path) f("path_derivative", a.path_derivative);
  if (direction != Direction::forward) f("needs", a.needs);
  if (op.scale_form) f("bound", a.bound);
}

// ---- From the formulas --------------------------------------------------------------------------

template <class S>
constexpr Kernels kernels_of() {
  return {index_of<S>, S::step};
}

template <class V>
constexpr Variant variant_of() {
  Variant v{.operands = V::Forward::step.inputs,
            .forward = kernels_of<typename V::Forward>(),
            .backward = kernels_of<typename V::Backward>()};
  if constexpr (is_likelihood<V>) v.with_gradient = kernels_of<typename WithGradientOf<V>::type>();
  if constexpr (requires { typename V::WithoutZ; })
    v.without_z = kernels_of<typename V::WithoutZ::Backward>();
  if constexpr (requires { typename V::WithoutValue; })
    v.without_value = kernels_of<typename V::WithoutValue::Backward>();
  return v;
}

constexpr int operands_of(const Signature& signature) {
  int operands = 0;
  while (operands < kMaxOperands && signature.operands[operands]) ++operands;
  return operands;
}

template <class First, class... Others>
constexpr Declaration declaration_of(Op<First, Others...>) {
  Declaration d{.signature = First::signature,
                .noise = First::Forward::step.noise,
                .z = First::Forward::step.outputs > 0,
                .scale_form = First::Forward::step.bounded_input > 0,
                .variants = {variant_of<First>(), variant_of<Others>()...}};
  d.operands = operands_of(d.signature);
  return d;
}

template <class Other>
  requires(Other::signature.loop != Loop::map)
constexpr Declaration declaration_of(Op<Other>) {
  return {.signature = Other::signature,
          .operands = operands_of(Other::signature),
          .noise = Other::signature.draws,
          .z = Other::signature.draws};
}

template <class... O>
constexpr std::array<Declaration, sizeof...(O)> declarations_of(List<O...>) {
  return {declaration_of(O())...};
}

constexpr auto kDeclarations = declarations_of(Ops() + LogSumOps());
constexpr int kOps = int(kDeclarations.size());

}  // namespace fastvae
