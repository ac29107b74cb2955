#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "kernels.h"

// Only a torch with CUDA has this function; weak, so that the binary loads under one without.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);

namespace fastvae {
namespace {

void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error("fastvae." + std::string(op) + ": " + cudaGetErrorString(error));
}

cudaStream_t current_stream(const char* op, int device) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(device, &stream))
    throw std::runtime_error("fastvae." + std::string(op) + ": PyTorch gives no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// The sums of parts, and the counters of those that are done. Both belong to this call alone, so
// that calls on several streams, and replays of a captured one, never meet; the counters are set to
// 0 in the stream, which a graph captures and repeats as it does the kernel.
cudaError_t prepare(Cut& cut, const Plan& plan, const Step& step, int64_t size,
                    const Scratch& scratch, cudaStream_t stream) {
  if (cut.parts == 1) return cudaSuccess;
  const auto has_sums = [&](int k) {
    return step.value ? k == 0 : k < step.outputs && plan.output[k].mode == Mode::reduced;
  };
  const int64_t bytes = (cut.partial_sums * size + 15) / 16 * 16;
  int64_t count = 0;
  for (int k = 0; k < kMaxOutputs; ++k) count += has_sums(k);
  char* memory =
      static_cast<char*>(scratch(count * bytes + cut.counters * int64_t(sizeof(*cut.counter))));
  for (int k = 0; k < kMaxOutputs; ++k) {
    if (!has_sums(k)) continue;
    cut.partial[k] = memory;
    memory += bytes;
  }
  cut.counter = reinterpret_cast<unsigned*>(memory);
  return cudaMemsetAsync(memory, 0, size_t(cut.counters) * sizeof(*cut.counter), stream);
}

}  // namespace

void run_on_cuda(const char* op, int device, int index, const Step& step, DType dtype,
                 const Plan& plan, const Scratch& scratch) {
  static constexpr const CudaColumn* kColumns[kDTypes] = {&kCudaFloat32, &kCudaFloat64,
                                                          &kCudaBFloat16, &kCudaFloat16};
  const cudaStream_t stream = current_stream(op, device);
  const int64_t size = dtype == DType::float64 ? sizeof(double) : sizeof(float);
  for (Pass& pass : passes(plan, step, dtype)) {
    check(prepare(pass.cut, pass.plan, step, size, scratch, stream), op);
    check(kColumns[int(dtype)]->launch[index](pass.sums, pass.plan, pass.cut, stream), op);
  }
}

}  // namespace fastvae
