// Kernels whose threads meet at barriers, or miss each other. Prints how each launch ends.
#include <cstdio>

#include "cuda_runtime_api.h"

namespace {

constexpr unsigned kThreads = 64;

// Thread i of either warp swaps numbers with thread i of the other, twice; every warp then adds up.
template <bool FirstBarrier, bool SecondBarrier>
__global__ void swap_and_add(int* out) {
  __shared__ int box[kThreads];
  int x = int(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    box[threadIdx.x ^ 32] = x + 1000;
    if (FirstBarrier) __syncthreads();
    x = box[threadIdx.x];
    if (SecondBarrier) __syncthreads();
  }
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  out[blockIdx.x * kThreads + threadIdx.x] = x;
}

__global__ void one_thread_ends_early(int*) {
  if (threadIdx.x == 40) return;
  __syncthreads();
}

__global__ void one_lane_ends_early(int* out) {
  if (threadIdx.x != 40) out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}

__global__ void one_lane_makes_a_round_more(int* out) {
  for (unsigned i = 0; i < 1 + (threadIdx.x == 40); ++i)
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}

__global__ void warps_at_two_barriers(int*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

void report(const char* name, void (*kernel)(int*)) {
  constexpr unsigned kBlocks = 3;
  int numbers[kBlocks * kThreads] = {}, *out = numbers;
  const cudaError_t error = fastvae::launch_kernel(kernel, kBlocks, kThreads, nullptr, out);
  bool right = true;
  for (unsigned i = 0; i < kBlocks * kThreads; ++i)
    right = right && out[i] == 32 * 2000 + (i % kThreads < 32 ? 31 * 16 : 31 * 16 + 32 * 32);
  printf("%s: %s\n", name, error ? cudaGetErrorString(error) : right ? "right" : "wrong");
}

}  // namespace

int main() {
  report("both barriers", swap_and_add<true, true>);
  report("no first barrier", swap_and_add<false, true>);
  report("no second barrier", swap_and_add<true, false>);
  report("one thread ends early", one_thread_ends_early);
  report("one lane ends early", one_lane_ends_early);
  report("one lane makes a round more", one_lane_makes_a_round_more);
  report("warps at two barriers", warps_at_two_barriers);
  report("both barriers again", swap_and_add<true, true>);
}
