#include "api.h"

#include "run.h"

namespace fastvae {
namespace {

OptionalTensor taken(AtenTensorHandle handle) {
  return handle ? OptionalTensor(Tensor(handle)) : std::nullopt;
}

// A handle of the caller's own.
AtenTensorHandle given(const Tensor& tensor) {
  AtenTensorHandle handle = nullptr;
  if (tensor.defined())
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  return handle;
}

OutputHandles run_handles(int op, Direction direction, const Handles& handles,
                          const Arguments& arguments) {
  Tensors tensors;
  for (int k = 0; k < kMaxOperands; ++k) tensors.operand[k] = taken(handles.operand[k]);
  tensors.seed = taken(handles.seed);
  tensors.weight = taken(handles.weight);
  tensors.grad_z = taken(handles.grad_z);
  tensors.grad_value = taken(handles.grad_value);
  OutputHandles outputs;
  for (const Tensor& output : run(op, direction, tensors, arguments))
    outputs.push_back(given(output));
  return outputs;
}

}  // namespace

const Api& api() {
  static const Api api{
      .declarations = kDeclarations.data(), .name = operator_name, .run = run_handles};
  return api;
}

}  // namespace fastvae
