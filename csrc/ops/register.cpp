// torch.ops.fastvae: for every op its forward, `_backward` and, for likelihoods, `_with_grad`.
//
// In all of them `param` is 0 logvar, 1 log_std, 2 std, 3 var, or of counts 0 for their means, 1
// for the logarithms; a Gaussian whose second tensor is none is packed, its halves lying along
// `packed_dim`; `needs` has bit i set if the gradient of the i-th operand is wanted, and what is
// not wanted comes back undefined (None). `bound` is none, or applies to `logvar`: 0 hard, 1 soft,
// 2 straight-through or 3 tanh, low, high; or 4 ... 8, a number s of which sigma is made by
// e^{s/2}, e^s, s, sqrt(s), softplus(s), plus low, which is then read by `param` 1. `weight`,
// float32 (float64 for float64), broadcasts to the operands and multiplies each value before it is
// summed; it gets no gradient. `_with_grad` returns the value too, and the gradients for the
// upstream gradients `grad_value` of it.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <utility>

#include "call.h"
#include "run.h"

namespace fastvae {
namespace {

std::string list(const std::vector<std::string>& items) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : ", ") + item;
  return text;
}

std::string type(double) { return "float"; }
std::string type(int64_t) { return "int"; }
std::string type(bool) { return "bool"; }
std::string type(const Dims&) { return "int[]"; }
std::string type(const OptionalBound&) { return "float[]?"; }

// Whether the upstream gradient of one output may be missing: where there are two.
bool may_lack_gradients(const Declaration& op) { return op.z && op.sums(); }

std::string schema(int index, Direction direction) {
  const Declaration& op = kDeclarations[index];
  const bool forward = direction == Direction::forward;
  std::vector<std::string> in, out;
  const auto tensor = [&](bool optional, const std::string& name) {
    in.push_back((optional ? "Tensor? " : "Tensor ") + name);
  };
  if (!forward && op.z) tensor(may_lack_gradients(op), "grad_z");
  if (!forward && op.value())
    tensor(may_lack_gradients(op), std::string("grad_") + op.signature.value);
  for (int k = 0; k < op.operands; ++k) tensor(op.is_optional(k), op.signature.operands[k]);
  if (!forward && op.signature.keeps) tensor(false, op.signature.keeps);
  if (op.noise) tensor(false, "seed");
  if (op.sums()) tensor(true, "weight");
  const Arguments arguments;
  for_each_setting(op, direction, arguments, [&](const std::string& name, const auto& value) {
    in.push_back(type(value) + " " + name + (name == "bound" ? "=None" : ""));
  });
  if (forward && op.z) out.push_back("Tensor");
  if (direction != Direction::backward && op.value()) out.push_back("Tensor");
  if (forward && op.signature.keeps) out.push_back("Tensor");
  if (!forward) out.insert(out.end(), size_t(op.operands), "Tensor");
  const std::string returns = out.size() == 1 ? out[0] : "(" + list(out) + ")";
  return std::string(operator_name(index, direction)) + "(" + list(in) + ") -> " + returns;
}

// Takes a call's arguments from PyTorch's stack, in the order of the schema.
class Stack {
 public:
  explicit Stack(StableIValue* stack) : next_(stack) {}
  template <class T>
  void take(T& value) {
    value = torch::stable::detail::to<T>(*next_++);
  }
  void take(Dims& dims) {
    std::vector<int64_t> values;
    take(values);
    dims = to_dims(values);
  }
  void take(OptionalTensor& tensor, bool optional) {
    if (optional) return take(tensor);
    Tensor given;
    take(given);
    tensor = given;
  }

 private:
  StableIValue* next_;
};

void take_arguments(Stack stack, const Declaration& op, Direction direction, Tensors& tensors,
                    Arguments& arguments) {
  const bool forward = direction == Direction::forward;
  if (!forward && op.z) stack.take(tensors.grad_z, may_lack_gradients(op));
  if (!forward && op.value()) stack.take(tensors.grad_value, may_lack_gradients(op));
  for (int k = 0; k < op.operands; ++k) stack.take(tensors.operand[k], op.is_optional(k));
  if (!forward && op.signature.keeps) stack.take(tensors.kept, false);
  if (op.noise) stack.take(tensors.seed, false);
  if (op.sums()) stack.take(tensors.weight, true);
  for_each_setting(op, direction, arguments, [&](const char*, auto& value) { stack.take(value); });
}

// The same function serves every device; Call chooses the kernel.
template <int kIndex, Direction kDirection>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Tensors tensors;
  Arguments arguments;
  take_arguments(Stack(stack), kDeclarations[kIndex], kDirection, tensors, arguments);
  const Outputs outputs = run(kIndex, kDirection, tensors, arguments);
  for (size_t k = 0; k < outputs.size(); ++k) stack[k] = torch::stable::detail::from(outputs[k]);
}

// gradient *= factor, a 0-d tensor on the same device, unless that is 1: then nothing is read or
// written, and the host need not wait to know. On the CPU the caller knows.
void scale_(Tensor gradient, const Tensor& factor) {
  Call call("scale_");
  call.input("gradient", gradient);
  call.scale(factor);
}

template <class F>
void for_each_operator(const F& f) {
  const auto of_op = [&]<int I>(std::integral_constant<int, I>) {
    f.template operator()<I, Direction::forward>();
    f.template operator()<I, Direction::backward>();
    if constexpr (kDeclarations[I].has_loss()) f.template operator()<I, Direction::with_gradient>();
  };
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (of_op(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, kOps>());
}

template <class Library>
void implement(Library& m) {
  for_each_operator([&]<int I, Direction D>() { m.impl(operator_name(I, D), &boxed<I, D>); });
  m.impl("scale_", TORCH_BOX(&scale_));
}

}  // namespace

STABLE_TORCH_LIBRARY(fastvae, m) {
  for_each_operator([&]<int I, Direction D>() { m.def(schema(I, D).c_str()); });
  m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(fastvae, CUDA, m) { implement(m); }

}  // namespace fastvae
