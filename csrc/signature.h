// How an op is called. Plain data, no torch.
//
// A formula's struct declares itself by a `signature`; what its steps say of themselves (plan.h)
// says the rest. From both follow, for every op alike (ops/declaration.h), the schema of
// torch.ops.fastvae.<name> and of its `_backward` and `_with_grad`, the reading of their arguments,
// and what Python knows of the op (fastvae/ops/declare.py).
#pragma once

namespace fastvae {

constexpr int kMaxOperands = 4;

enum class Loop {
  map,           // over elements that broadcast, perhaps summed over rows (plan.h)
  pairs,         // the first operand's rows meet the components that the others are (pairs.h)
  items,         // the second operand has rows of logits; the first chooses among them (items.h)
  categoricals,  // the operands have groups of logits (categoricals.h)
  colours        // the second operand has planes of what the colours of the first are a mixture of
};

struct Signature {
  const char* name;
  // The tensors, in the order of the steps' inputs; null behind the last.
  const char* operands[kMaxOperands];
  // What is summed over a row; null where nothing is.
  const char* value = nullptr;
  // The operands are Gaussians, two each. Those behind the first may be left out, and the second of
  // each too: then the first holds both, packed along `packed_dim`.
  bool gaussians = false;
  // Takes a `balance` of the gradients.
  bool balances = false;
  // Draws samples of a `sample_shape`.
  bool samples = false;
  // Takes `path_derivative`.
  bool path = false;
  // The name of a number that stands for the last operand where that is left out.
  const char* number = nullptr;
  // Data are `bins` levels from `low` to `high`.
  bool levels = false;
  // Data are counts, and the names that `param` has: their means and dispersions, or the
  // logarithms.
  const char* rates[2] = {};
  // Draws a sample that is returned; of a map its steps say so.
  bool draws = false;
  // What computes the op.
  Loop loop = Loop::map;
  // The last operand may be left out.
  bool optional = false;
  // It weighs the components, which are then summed over.
  bool weighs = false;
  // A float64 tensor that forward gives beside the value, for backward alone.
  const char* keeps = nullptr;
};

}  // namespace fastvae
