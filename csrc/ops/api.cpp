#include "api.h"

#include "../cpu/dispatch.h"
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
  tensors.kept = taken(handles.kept);
  tensors.seed = taken(handles.seed);
  tensors.weight = taken(handles.weight);
  tensors.grad_z = taken(handles.grad_z);
  tensors.grad_value = taken(handles.grad_value);
  OutputHandles outputs;
  for (const Tensor& output : run(op, direction, tensors, arguments))
    outputs.push_back(given(output));
  return outputs;
}

constexpr Build kBuild{
#if defined(__clang__)
    .compiler = "Clang " __clang_version__,
#elif defined(__GNUC__)
    .compiler = "GCC " __VERSION__,
#else
    .compiler = "unknown",
#endif
    .cxx_standard = long(__cplusplus),
    .torch = FASTVAE_TORCH_BUILT,
#ifdef USE_CUDA
    .cuda = FASTVAE_CUDA,
    .cuda_archs = FASTVAE_CUDA_ARCHS,
#endif
#if FASTVAE_X86
    .instruction_sets = "avx2;avx512",
#else
    .instruction_sets = "baseline",
#endif
};

}  // namespace
}  // namespace fastvae

const fastvae::Api* fastvae_api() {
  using namespace fastvae;
  static const Api api{.build = kBuild,
                       .cpu_capability = cpu_capability,
                       .declarations = kDeclarations.data(),
                       .name = operator_name,
                       .run = run_handles};
  return &api;
}
