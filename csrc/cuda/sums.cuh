// Sums over threads, in an order that depends on nothing but their number.
#pragma once

#include "piece.cuh"

namespace fastvae {

__device__ inline void group_barrier(int threads) {
  if (threads > kWarp)
    __syncthreads();
  else
    __syncwarp();
}

// What `combine` makes of the numbers of a group of `threads`, a block or at most a warp, for each
// of them. All threads of the block must call it.
template <class A, class F>
__device__ A group_reduce(A x, int threads, F combine) {
  for (int distance = min(threads, kWarp) / 2; distance > 0; distance /= 2)
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
  if (threads <= kWarp) return x;
  __shared__ A of_warp[kBlockThreads / kWarp];
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = of_warp[0];
#pragma unroll
  for (int w = 1; w < kBlockThreads / kWarp; ++w) x = combine(x, of_warp[w]);
  return x;
}

template <class A>
__device__ A group_sum(A x, int threads) {
  return group_reduce(x, threads, [](A a, A b) { return a + b; });
}

// Counts, after all that this thread knows to have been written, and before all that is read from
// here on: what it counts.
__device__ inline unsigned count(unsigned* counter) {
#ifdef __CUDA_ARCH__
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
#else
  return atomicAdd(counter, 1u);
#endif
}

// Whether this group is the last of `parts` to come here, and may read what the others have written
// to global memory before. A group that is not active only takes part in the barriers.
//
// The barriers pass on to all threads what one of them has ordered (PTX ISA, causality order). The
// counter is set to 0 in the stream, before the kernel.
__device__ inline bool last_to_come(unsigned* counter, int parts, const Worker& worker) {
  group_barrier(worker.threads);
  const bool counts = worker.active && worker.thread == 0;
  const unsigned before = counts ? count(counter) : 0;
  const bool last = group_sum(before, worker.threads) == unsigned(parts) - 1;
  group_barrier(worker.threads);
  return last && worker.active;
}

}  // namespace fastvae
