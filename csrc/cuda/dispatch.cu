#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "kernels.h"
#include "memory.cuh"
#include "stream.h"

// Only a torch with CUDA has this function; weak, so that the binary loads under one without.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);

namespace fastvae {
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

namespace {

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

// Of the step at an index of all.
CudaLaunch find_launch(int index, DType dtype) {
  static constexpr const CudaKernels* kParts[kDTypes][3] = {
      {&kLatentsFloat32, &kDataFloat32, &kCountsFloat32},
      {&kLatentsFloat64, &kDataFloat64, &kCountsFloat64},
      {&kLatentsHalves, &kDataHalves, &kCountsHalves},
      {&kLatentsHalves, &kDataHalves, &kCountsHalves}};
  const CudaKernels* const* part = kParts[int(dtype)];
  while (index >= (*part)->count) index -= (*part++)->count;
  return (*part)->launch[index];
}

constexpr int kScaleThreads = 256, kScaleBlock = 16 * kScaleThreads;  // elements of a block

template <class T, class F>
__global__ void __launch_bounds__(kScaleThreads) scale(T* x, int64_t n, const F* factor) {
  const F f = *factor;
  if (f == F(1)) return;
  const int64_t first = int64_t(blockIdx.x) * kScaleBlock, end = min(first + kScaleBlock, n);
  for (int64_t i = first + threadIdx.x; i < end; i += kScaleThreads)
    narrow(Accumulate<T>(widen(x[i]) * f), x[i]);
}

}  // namespace

void scale_on_cuda(const char* op, int device, DType dtype, void* data, int64_t n,
                   DType factor_dtype, const void* factor) {
  if (n == 0) return;
  const auto blocks = unsigned((n + kScaleBlock - 1) / kScaleBlock);
  const auto launch = [&]<class T, class F>(T* x, const F* f) {
    const cudaStream_t stream = current_stream(op, device);
    check(launch_kernel(scale<T, F>, blocks, kScaleThreads, stream, x, n, f), op);
  };
  const auto by = [&]<class T>(T* x) {
    if (factor_dtype == DType::float64)
      launch(x, static_cast<const double*>(factor));
    else
      launch(x, static_cast<const float*>(factor));
  };
  switch (dtype) {
    case DType::float32:
      return by(static_cast<float*>(data));
    case DType::float64:
      return by(static_cast<double*>(data));
    case DType::bfloat16:
      return by(static_cast<__nv_bfloat16*>(data));
    case DType::float16:
      return by(static_cast<__half*>(data));
  }
}

void run_on_cuda(const char* op, int device, int index, const Step& step, DType dtype,
                 const Plan& plan, const Scratch& scratch) {
  const cudaStream_t stream = current_stream(op, device);
  const CudaLaunch launch = find_launch(index, dtype);
  const int64_t size = dtype == DType::float64 ? sizeof(double) : sizeof(float);
  for (Pass& pass : passes(plan, step, dtype)) {
    check(prepare(pass.cut, pass.plan, step, size, scratch, stream), op);
    check(launch(pass.sums, pass.plan, pass.cut, stream), op);
  }
}

}  // namespace fastvae
