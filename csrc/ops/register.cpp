// torch.ops.fastvae: for every op its forward, `_backward` and, for likelihoods, `_with_grad`.
//
// In all of them `param` is 0 logvar, 1 log_std, 2 std, 3 var; a Gaussian whose second tensor is
// none is packed, its halves lying along `packed_dim`; `needs` has bit i set if the gradient of the
// i-th operand is wanted, and what is not wanted comes back undefined (None). `bound` is none, or
// applies to `logvar`: 0 hard, 1 soft or 2 straight-through, low, high. `_with_grad` returns the
// value too, and the gradients for the upstream gradients `grad_value` of it.
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

std::string schema(int index, Direction direction) {
  const Declaration& op = kDeclarations[index];
  const Signature& s = op.signature;
  const bool forward = direction == Direction::forward;
  const bool both = op.z && op.sums();  // then either gradient may be missing
  std::vector<std::string> in, out;
  if (!forward && op.z) in.push_back(both ? "Tensor? grad_z" : "Tensor grad_z");
  if (!forward && op.sums())
    in.push_back((both ? "Tensor? grad_" : "Tensor grad_") + std::string(s.value));
  for (int k = 0; k < op.operands; ++k) {
    const bool optional = s.gaussians ? k > 0 : s.number && k == op.operands - 1;
    in.push_back((optional ? "Tensor? " : "Tensor ") + std::string(s.operands[k]));
  }
  if (s.number) in.push_back("float " + std::string(s.number));
  if (op.noise) in.push_back("Tensor seed");
  if (op.scale_form) in.push_back("int param");
  if (s.gaussians) in.push_back("int packed_dim");
  if (s.levels) in.insert(in.end(), {"int bins", "float low", "float high"});
  if (op.sums()) in.push_back("int event_ndim");
  if (s.samples) in.push_back("int[] sample_shape");
  if (op.path) in.push_back("bool path_derivative");
  if (!forward) in.push_back("int needs");
  if (op.scale_form) in.push_back("float[]? bound=None");
  if (forward && op.z) out.push_back("Tensor");
  if (direction != Direction::backward && op.sums()) out.push_back("Tensor");
  if (!forward) out.insert(out.end(), size_t(op.operands), "Tensor");
  const std::string returns = out.size() == 1 ? out[0] : "(" + list(out) + ")";
  return std::string(operator_name(index, direction)) + "(" + list(in) + ") -> " + returns;
}

// Takes a call's arguments from PyTorch's stack, in the order of the schema.
class Stack {
 public:
  explicit Stack(StableIValue* stack) : next_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

void take_arguments(Stack stack, const Declaration& op, Direction direction, Tensors& tensors,
                    Arguments& a) {
  const Signature& s = op.signature;
  const bool forward = direction == Direction::forward;
  const auto tensor = [&](bool optional) -> OptionalTensor {
    return optional ? stack.take<OptionalTensor>() : stack.take<Tensor>();
  };
  const bool both = op.z && op.sums();
  if (!forward && op.z) tensors.grad_z = tensor(both);
  if (!forward && op.sums()) tensors.grad_value = tensor(both);
  for (int k = 0; k < op.operands; ++k)
    tensors.operand[k] = tensor(s.gaussians ? k > 0 : s.number && k == op.operands - 1);
  if (s.number) a.number = stack.take<double>();
  if (op.noise) tensors.seed = stack.take<Tensor>();
  if (op.scale_form) a.param = stack.take<int64_t>();
  if (s.gaussians) a.packed_dim = stack.take<int64_t>();
  if (s.levels) {
    a.bins = stack.take<int64_t>();
    a.low = stack.take<double>();
    a.high = stack.take<double>();
  }
  if (op.sums()) a.event_ndim = stack.take<int64_t>();
  if (s.samples) a.sample_shape = to_dims(stack.take<std::vector<int64_t>>());
  if (op.path) a.path_derivative = stack.take<bool>();
  if (!forward) a.needs = stack.take<int64_t>();
  if (op.scale_form) a.bound = stack.take<std::optional<std::vector<double>>>();
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
