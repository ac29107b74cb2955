// What the binary `fastvae._C` offers to the library of autograd nodes (autograd/): the ops,
// without the detour through PyTorch's dispatcher. Plain C++, no torch but its opaque handles.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "declaration.h"

namespace fastvae {

// Handles are given away with the call; null stands for what is not given or not wanted.
struct Handles {
  std::array<AtenTensorHandle, kMaxOperands> operand{};
  AtenTensorHandle seed = nullptr, weight = nullptr, grad_z = nullptr, grad_value = nullptr;
};
using OutputHandles = InlineVector<AtenTensorHandle, kMaxOperands + 1>;

struct Api {
  // Both binaries must have been built from the same sources.
  int ops = kOps;
  int64_t size = int64_t(sizeof(Declaration) * 1000 + sizeof(Arguments)) * 1000 + sizeof(Handles);

  const Declaration* declarations = nullptr;
  const char* (*name)(int op, Direction direction) = nullptr;
  OutputHandles (*run)(int op, Direction direction, const Handles& handles,
                       const Arguments& arguments) = nullptr;
};

const Api& api();

constexpr const char* kApiCapsule = "fastvae._C._api";

}  // namespace fastvae
