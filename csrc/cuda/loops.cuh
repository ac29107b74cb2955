// The CUDA loop: a map over elements, with the value summed over rows.
//
// A group of threads, a warp or a whole block, takes one unit of the plan at a time. Its threads
// share out the unit's accesses: `kWidth` neighbouring elements of one piece, 16 bytes or more,
// which start on a multiple of four columns of the noise stream so that no Philox call is made
// twice. Elements of an access that lie outside the piece, and accesses that memory does not align,
// are handled one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../formulas.h"
#include "../philox.h"
#include "../plan.h"
#include "kernels.h"

namespace fastvae {

constexpr int kBlockThreads = 256;
constexpr int kWarp = 32;

// ---- Elements in memory ------------------------------------------------------------------------

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }

template <class T, int N>
struct alignas(16) Packet {
  T x[N];
};

// A thread's view of one access: which of its elements exist, and where they lie.
template <int N>
struct Access {
  int64_t start;    // of element 0 inside the piece; may be negative
  int first, last;  // elements that exist

  __device__ bool whole() const { return first == 0 && last == N; }
};

template <class T, int N, class A>
__device__ void load(const Input& input, int64_t offset, const Access<N>& at, A (&x)[N]) {
  const T* p = static_cast<const T*>(input.data) + offset;
  if (input.data == nullptr || input.layout.inner == 0) {
    const A same = input.data ? A(widen(*p)) : A(input.constant);
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = same;
    return;
  }
  p += at.start;
  if (at.whole() && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    const auto packet = *reinterpret_cast<const Packet<T, N>*>(p);
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = widen(packet.x[e]);
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = e >= at.first && e < at.last ? A(widen(p[e])) : A(0);
}

template <class T, int N, class A>
__device__ void store(const Output& output, int64_t offset, const Access<N>& at, const A (&x)[N]) {
  T* p = static_cast<T*>(output.data) + offset + at.start;
  if (at.whole() && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    Packet<T, N> packet;
#pragma unroll
    for (int e = 0; e < N; ++e) narrow(x[e], packet.x[e]);
    *reinterpret_cast<Packet<T, N>*>(p) = packet;
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e >= at.first && e < at.last) narrow(x[e], p[e]);
}

__device__ inline int64_t offset_at(const Layout& layout, const int64_t (&index)[kMaxDims],
                                    int dims) {
  int64_t offset = 0;
#pragma unroll
  for (int d = 0; d < kMaxDims; ++d)
    if (d < dims) offset += index[d] * layout.stride[d];
  return offset;
}

// ---- Noise -------------------------------------------------------------------------------------

// The normals of an access to a piece that begins at `row`, `column`, `sample`.
template <int N>
__device__ void draw(const Noise& noise, int64_t row, int64_t column, int64_t sample,
                     const Access<N>& at, float (&eps)[N]) {
  const auto quad = [&](int64_t row, int64_t column, int64_t sample, float (&x)[4]) {
    const uint64_t seed = uint64_t(noise.seed[noise.seed_per_row ? row : 0]);
    const uint64_t row_words = noise.seed_per_row ? 0 : uint64_t(row);
    const auto words = philox(Block<uint32_t>{{uint32_t(column / 4), uint32_t(row_words),
                                               uint32_t(row_words >> 32), uint32_t(sample)}},
                              uint32_t(seed), uint32_t(seed >> 32));
    const auto a = box_muller<float>(int32_t(words.w[0]), int32_t(words.w[1]));
    const auto b = box_muller<float>(int32_t(words.w[2]), int32_t(words.w[3]));
    x[0] = a.first;
    x[1] = a.second;
    x[2] = b.first;
    x[3] = b.second;
  };
  if (noise.row.inner == 0 && noise.sample.inner == 0 && noise.column.inner == 1) {
#pragma unroll
    for (int e = 0; e < N; e += 4) {
      float x[4];
      quad(row, column + at.start + e, sample, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) eps[e + i] = x[i];
    }
    return;
  }
#pragma unroll 1
  for (int e = 0; e < N; ++e) {
    if (e < at.first || e >= at.last) continue;  // such a row may have no seed
    const int64_t j = at.start + e;
    const int64_t c = column + j * noise.column.inner;
    float x[4];
    quad(row + j * noise.row.inner, c, sample + j * noise.sample.inner, x);
    const int i = int(c % 4);
    const float chosen = i < 2 ? (i == 0 ? x[0] : x[1]) : (i == 2 ? x[2] : x[3]);
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k == e) eps[k] = chosen;  // registers have no index
  }
}

// ---- The loop ----------------------------------------------------------------------------------

// One thread's part of a unit, and its part of the unit's sum.
template <class Op, class T>
__device__ Accumulate<T> unit_part(const Plan& plan, int64_t unit, int thread, int threads) {
  using A = Accumulate<T>;
  constexpr Step kStep = Op::step;
  constexpr int I = kStep.inputs, O = kStep.outputs;
  constexpr int kWidth = sizeof(T) == 2 ? 8 : 4;

  const int64_t row = unit / plan.units_per_row, in_row = unit % plan.units_per_row;
  const int64_t segment = in_row % plan.segments;
  const int64_t first_piece = in_row / plan.segments * plan.pieces_per_unit;
  const int64_t first = segment * plan.segment_size;
  const int64_t last = min(first + plan.segment_size, plan.inner);
  // A unit is small: 32 bits count what is in it. One access more than fits where the noise may
  // start between multiples of four.
  const int pieces = int(min(plan.pieces_per_unit, plan.pieces_per_row - first_piece));
  const int accesses = (int(last - first) + (kStep.noise ? 3 : 0) + kWidth - 1) / kWidth;

  A sum = 0;
  for (int item = thread; item < pieces * accesses; item += threads) {
    int64_t piece = row * plan.pieces_per_row + first_piece + item / accesses;
    int64_t index[kMaxDims] = {};
#pragma unroll
    for (int d = kMaxDims - 1; d > 0; --d) {
      if (d >= plan.dims) continue;
      index[d] = piece % plan.size[d];
      piece /= plan.size[d];
    }
    index[0] = piece;
    const auto offset = [&](const Layout& layout) { return offset_at(layout, index, plan.dims); };
    const int64_t column = kStep.noise ? offset(plan.noise.column) : 0;
    const int skip = kStep.noise && plan.noise.column.inner == 1 ? int((column + first) % 4) : 0;
    Access<kWidth> at;
    at.start = first - skip + item % accesses * kWidth;
    at.first = int(max(first - at.start, int64_t(0)));
    at.last = int(min(last - at.start, int64_t(kWidth)));
    if (at.last <= at.first) continue;

    A in[I > 0 ? I : 1][kWidth], out[O > 0 ? O : 1][kWidth], grad[kWidth] = {}, value[kWidth] = {};
    float eps[kWidth] = {};
#pragma unroll
    for (int k = 0; k < I; ++k) load<T>(plan.input[k], offset(plan.input[k].layout), at, in[k]);
    if constexpr (kStep.row_grad) load<A>(plan.row_grad, offset(plan.row_grad.layout), at, grad);
    if constexpr (kStep.noise)
      draw(plan.noise, offset(plan.noise.row), column, offset(plan.noise.sample), at, eps);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      A x[I], y[O > 0 ? O : 1];
#pragma unroll
      for (int k = 0; k < I; ++k) x[k] = in[k][e];
      value[e] = Op::apply(Scale{plan.scale}, x, grad[e], A(eps[e]), y);
#pragma unroll
      for (int k = 0; k < O; ++k) out[k][e] = y[k];
      if (kStep.value && e >= at.first && e < at.last) sum += value[e];
    }
#pragma unroll
    for (int k = 0; k < O; ++k) {
      const Output& output = plan.output[k];
      if (output.mode == Mode::discard) continue;
      // Of a reduced output the terms, in accumulation type, for the caller to add up.
      if (sizeof(A) == sizeof(T) || output.mode == Mode::full)
        store<T>(output, offset(output.layout), at, out[k]);
      else
        store<A>(output, offset(output.layout), at, out[k]);
    }
    if constexpr (kStep.value)
      if (plan.value.mode == Mode::full) store<A>(plan.value, offset(plan.value.layout), at, value);
  }
  return sum;
}

template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// `threads`, a warp's or a block's, take a unit together. The sum's order is fixed by its tree.
template <class Op, class T>
__global__ void __launch_bounds__(kBlockThreads)
    loop(const __grid_constant__ Plan plan, int threads) {
  using A = Accumulate<T>;
  __shared__ A warp_sums[kBlockThreads / kWarp];
  const int groups = kBlockThreads / threads;
  const int group = int(threadIdx.x) / threads, thread = int(threadIdx.x) % threads;
  for (int64_t unit = int64_t(blockIdx.x) * groups + group; unit < plan.units;
       unit += int64_t(gridDim.x) * groups) {
    A sum = unit_part<Op, T>(plan, unit, thread, threads);
    if (!Op::step.value || plan.unit_sums == nullptr) continue;
    __syncwarp();
    sum = warp_sum(sum);
    if (threads > kWarp) {
      if (thread % kWarp == 0) warp_sums[thread / kWarp] = sum;
      __syncthreads();
      sum = warp_sum(thread < threads / kWarp ? warp_sums[thread] : A(0));
      __syncthreads();
    }
    if (thread == 0) static_cast<A*>(plan.unit_sums)[unit] = sum;
  }
}

template <class Op, class T>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  const int64_t elements = plan.pieces * plan.inner / plan.units;  // of a unit, roughly
  const int threads = elements <= 8 * kWarp ? kWarp : kBlockThreads;
  const int64_t groups = kBlockThreads / threads;
  const int64_t blocks = (plan.units + groups - 1) / groups;
  constexpr int64_t kMostBlocks = 1 << 20;  // the rest by the grid-stride loop
  return launch_kernel(loop<Op, T>, unsigned(blocks < kMostBlocks ? blocks : kMostBlocks),
                       kBlockThreads, stream, plan, threads);
}

template <class T, class... Ops>
constexpr CudaColumn make_column(List<Ops...>) {
  return {{launch<Ops, T>...}};
}

}  // namespace fastvae
