// A call of any op, as its declaration tells: the same for every device and for every caller, be it
// PyTorch's dispatcher (register.cpp) or a node of autograd's graph (autograd/).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "declaration.h"

// Its name in torch 2.11.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fastvae {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Tensors {
  std::array<OptionalTensor, kMaxOperands> operand;
  OptionalTensor kept;  // by forward
  OptionalTensor seed, weight;
  OptionalTensor grad_z, grad_value;
};

// Forward: z, if the op has one, the value, and what it keeps. Otherwise the value, if it is
// `with_gradient`, and a gradient for each operand, undefined where it is not wanted.
using Outputs = InlineVector<Tensor, kMaxOperands + 1>;

Outputs run(int op, Direction direction, const Tensors& tensors, const Arguments& arguments);

// The name of an operator of torch.ops.fastvae.
const char* operator_name(int op, Direction direction);

}  // namespace fastvae
