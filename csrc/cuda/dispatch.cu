#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "kernels.h"

// Only a torch with CUDA has this function; weak, so that the binary loads under one without.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);

namespace fastvae {
namespace {

constexpr int kThreads = 256;

template <class A>
__global__ void add(const A* from, int64_t stride, int64_t count, int64_t step, A* to, int64_t n) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * kThreads) {
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += from[i * stride + j * step];
    to[i] = A(sum);
  }
}

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

}  // namespace

void run_on_cuda(const char* op, int device, int step, DType dtype, const Plan& plan) {
  static constexpr const CudaColumn* kColumns[kDTypes] = {&kCudaFloat32, &kCudaFloat64,
                                                          &kCudaBFloat16, &kCudaFloat16};
  check(kColumns[int(dtype)]->launch[step](plan, current_stream(op, device)), op);
}

void add_on_cuda(const char* op, int device, DType accumulate, const void* from, int64_t stride,
                 int64_t count, int64_t step, void* to, int64_t n) {
  const auto stream = current_stream(op, device);
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  const auto grid = unsigned(blocks < (1 << 20) ? blocks : 1 << 20);
  const auto launch = [&]<class A>(const A* from, A* to) {
    check(launch_kernel(add<A>, grid, kThreads, stream, from, stride, count, step, to, n), op);
  };
  if (accumulate == DType::float64)
    launch(static_cast<const double*>(from), static_cast<double*>(to));
  else
    launch(static_cast<const float*>(from), static_cast<float*>(to));
}

}  // namespace fastvae
