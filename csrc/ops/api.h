// What the library of kernels offers to the modules of Python beside it, `fastvae._C` (module.cpp)
// and autograd's nodes (autograd/): what it is, and the ops without the detour through PyTorch's
// dispatcher. Plain C++, no torch but its opaque handles.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "declaration.h"

namespace fastvae {

// Handles are given away with the call; null stands for what is not given or not wanted.
struct Handles {
  std::array<AtenTensorHandle, kMaxOperands> operand{};
  AtenTensorHandle kept = nullptr, seed = nullptr, weight = nullptr;
  AtenTensorHandle grad_z = nullptr, grad_value = nullptr;
};
using OutputHandles = InlineVector<AtenTensorHandle, kMaxOperands + 1>;

// What the library was built with and for; lists are separated by semicolons.
struct Build {
  const char* compiler = nullptr;
  long cxx_standard = 0;
  const char* torch = nullptr;
  const char *cuda = nullptr, *cuda_archs = nullptr;  // null without CUDA
  const char* instruction_sets = nullptr;
};

struct Api {
  // All must have been built from the same sources.
  int ops = kOps;
  int64_t size = int64_t(sizeof(Declaration) * 1000 + sizeof(Arguments)) * 1000 + sizeof(Handles);

  Build build;
  const char* (*cpu_capability)() = nullptr;
  const Declaration* declarations = nullptr;
  const char* (*name)(int op, Direction direction) = nullptr;
  OutputHandles (*run)(int op, Direction direction, const Handles& handles,
                       const Arguments& arguments) = nullptr;

  bool fits() const { return ops == kOps && size == Api().size; }
};

constexpr const char* kApiCapsule = "fastvae._C._api";

}  // namespace fastvae

// The only symbol of the library that others look up.
extern "C" [[gnu::visibility("default")]] const fastvae::Api* fastvae_api();
