// The ops as nodes of autograd's graph, in C++: one for all of them, as their declarations tell.
// Built for one torch, beside the binary that runs on every torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include "../ops/api.h"

namespace fastvae {

using TensorList = std::vector<at::Tensor>;  // undefined: not given, not wanted

struct Request {
  int op = 0;
  std::array<at::Tensor, kMaxOperands> operand;
  at::Tensor kept;  // by forward, for backward
  at::Tensor seed;  // undefined: to be drawn
  at::Tensor weight;
  Arguments arguments;
};

// The ops of fastvae._C.
const Api& ops();

// Whether a call may come here: dense tensors of a CPU or GPU, and nothing between them and the
// kernel that would have its say in the dispatcher (modes, functorch, tracing, tangents).
bool is_plain(const Request& request);

TensorList call(Request& request);

// The mean or sum over all rows of minus the value, with its gradients made in the same pass.
// Undefined where that takes two steps.
at::Tensor loss(Request& request, bool mean);

// What the node of a loss keeps beside its inputs: gradients. Nothing for other nodes.
TensorList kept_by(const torch::autograd::Node& node);

// Gradients by the definition in Python, for a backward pass that is recorded or transformed.
using ByDefinition = TensorList (*)(const Request& request, const TensorList& grads);

void use(const Api& ops, ByDefinition by_definition);

}  // namespace fastvae
