#include "call.h"
#include "log_sums.h"

namespace fastvae {
namespace {

constexpr const char* kSuffix[kDirections] = {"", "_backward", "_with_grad"};

// How many operands are given, each Gaussian's second being one with its first.
int given_operands(const Declaration& op, const Tensors& tensors, const char* name) {
  if (!op.signature.gaussians) return op.operands;
  int given = 2;
  for (; given < op.operands && tensors.operand[given]; given += 2) {
  }
  for (int k = given; k < op.operands; ++k)
    if (tensors.operand[k])
      throw std::runtime_error("fastvae." + std::string(name) + ": " + op.signature.operands[k] +
                               " is given without " + op.signature.operands[k - 1]);
  return given;
}

void add_operands(Call& call, const Declaration& op, const Tensors& tensors, const Arguments& a,
                  int given) {
  const Signature& s = op.signature;
  for (int k = 0; k < given; ++k) {
    const OptionalTensor& tensor = tensors.operand[k];
    if (s.gaussians) {
      call.gaussian(s.operands[k], *tensor, s.operands[k + 1], tensors.operand[k + 1],
                    a.packed_dim);
      ++k;
    } else if (tensor) {
      call.input(s.operands[k], *tensor);
    } else {
      call.constant(a.number);
    }
  }
}

Outputs gradients(Call& call, const Declaration& op, const Arguments& a, int given) {
  Outputs results;
  for (const Tensor& gradient : call.gradients(given, a.needs)) results.push_back(gradient);
  results.resize(op.operands);
  return results;
}

}  // namespace

const char* operator_name(int op, Direction direction) {
  static const auto names = [] {
    std::array<std::array<std::string, kDirections>, kOps> all;
    for (int i = 0; i < kOps; ++i)
      for (int d = 0; d < kDirections; ++d)
        all[i][d] = std::string(kDeclarations[i].signature.name) + kSuffix[d];
    return all;
  }();
  return names[op][int(direction)].c_str();
}

Outputs run(int index, Direction direction, const Tensors& tensors, const Arguments& a) {
  const Declaration& op = kDeclarations[index];
  const char* name = operator_name(index, direction);
  if (op.signature.loop != Loop::map) return run_log_sum(op, name, direction, tensors, a);
  int given = given_operands(op, tensors, name);
  const Variant& variant = op.variant(given);
  if (given < variant.operands)
    throw std::runtime_error("fastvae." + std::string(name) + ": " + op.signature.operands[given] +
                             " is missing");
  Call call(name, op.scale_form ? a.param : 0, a.bound);

  Kernels kernels = variant.forward;
  bool z = op.z, sums = op.sums();
  if (direction == Direction::with_gradient) {
    kernels = variant.with_gradient;
  } else if (direction == Direction::backward) {
    kernels = variant.backward;
    if (z && sums && !tensors.grad_z && variant.without_z.index >= 0) {
      kernels = variant.without_z;
      z = false;
    } else if (z && sums && !tensors.grad_value && variant.without_value.index >= 0) {
      kernels = variant.without_value;
      given = 2;
      sums = false;
    }
  }

  add_operands(call, op, tensors, a, given);
  if (kernels.step.noise) call.noise(*tensors.seed, a.sample_shape);
  if (op.signature.levels) call.levels(a.bins, a.low, a.high);
  if (op.signature.balances) call.balance(a.balance);
  call.path(a.path_derivative);
  if (op.counts()) call.counts(a.param, a.needs & 1);
  if (sums) call.rows(a.event_ndim, tensors.weight);
  Outputs results;
  if (direction == Direction::forward) {
    if (z) results.push_back(call.output());
    if (sums) results.push_back(call.value());
    call.run(kernels);
    return results;
  }
  if (z) call.grad_output(tensors.grad_z);
  if (sums) call.grad_value(tensors.grad_value, a.grad_value);
  const Outputs grads = gradients(call, op, a, given);
  if (direction == Direction::with_gradient) {
    if (call.sums_gradients_on_gpu()) {  // where a loop sums either those or values
      results = run(index, Direction::forward, tensors, a);
      const Outputs others = run(index, Direction::backward, tensors, a);
      results.append(others.begin(), others.end());
      return results;
    }
    results.push_back(call.value());
  }
  call.run(kernels);
  results.append(grads.begin(), grads.end());
  return results;
}

}  // namespace fastvae
