// Where a group of threads works, and where the operands of a thread's piece lie.
#pragma once

#include "memory.cuh"
#include "noise.cuh"

namespace fastvae {

// A thread's place in its group, and the group's unit.
struct Worker {
  int threads, thread;  // of the group
  int64_t index;        // of the unit
  bool active;          // there is such a unit

  __device__ explicit Worker(const Cut& cut) {
    threads = 1 << cut.group_bits;
    thread = int(threadIdx.x) & (threads - 1);
    const int64_t groups = kBlockThreads >> cut.group_bits;
    index = blockIdx.x * groups + (int(threadIdx.x) >> cut.group_bits);
    active = index < cut.units;
    if (!active) index = 0;
  }
};

struct Unit {
  int64_t row, run, segment;
  int64_t first_piece, last_piece;  // among all
  int64_t first, last;              // elements of each of these pieces

  __device__ Unit(const Plan& plan, const Cut& cut, int64_t unit) {
    if (cut.kind == Units::any) {
      row = cut.units_per_row.divide(unit);
      run = cut.segments.divide(unit);
      segment = unit;
      first_piece = run * cut.pieces_per_unit;
      last_piece = min(first_piece + cut.pieces_per_unit, plan.pieces_per_row);
      first_piece += row * plan.pieces_per_row;
      last_piece += row * plan.pieces_per_row;
    } else {
      row = cut.kind == Units::pieces ? unit : 0;
      segment = cut.kind == Units::pieces ? 0 : unit;
      run = 0;
      first_piece = row;
      last_piece = row + 1;
    }
    first = segment * cut.segment_size;
    last = min(first + cut.segment_size, plan.inner);
  }
};

// The part of a piece that lies in a unit: where the operands of its first element are. In wide
// kernels neighbours are neighbours in memory, but for a scale that all have in common.
template <class Op, class T, bool kWide>
struct Piece {
  using A = Accumulate<T>;
  static constexpr Step kStep = Op::step;
  static constexpr int I = kStep.inputs, O = kStep.outputs > 0 ? kStep.outputs : 1;

  const T* input[I];
  T* output[O];
  const A* row_grad;
  const A* weight;
  A* value;
  NoisePlace noise;

  __device__ Piece(const Plan& plan, const Cut& cut, int64_t piece, int64_t first) {
    int64_t in[I], out[O], grad = first * plan.row_grad.layout.inner;
    int64_t number = first * plan.value.layout.inner, w = first * plan.weight.layout.inner;
#pragma unroll
    for (int k = 0; k < I; ++k)
      in[k] = kWide && k != kStep.scale_input ? first : first * plan.input[k].layout.inner;
#pragma unroll
    for (int k = 0; k < O; ++k) out[k] = first * plan.output[k].layout.inner;
    noise.row = first * plan.noise.row.inner;
    noise.column = first * plan.noise.column.inner;
    noise.sample = first * plan.noise.sample.inner;
#pragma unroll 1
    for (int d = plan.dims - 1; d >= 0; --d) {
      int64_t index = piece;
      if (d > 0) piece = cut.size[d].divide(index);
#pragma unroll
      for (int k = 0; k < I; ++k) in[k] += index * plan.input[k].layout.stride[d];
#pragma unroll
      for (int k = 0; k < O; ++k) out[k] += index * plan.output[k].layout.stride[d];
      grad += index * plan.row_grad.layout.stride[d];
      w += index * plan.weight.layout.stride[d];
      number += index * plan.value.layout.stride[d];
      noise.row += index * plan.noise.row.stride[d];
      noise.column += index * plan.noise.column.stride[d];
      noise.sample += index * plan.noise.sample.stride[d];
    }
#pragma unroll
    for (int k = 0; k < I; ++k) input[k] = static_cast<const T*>(plan.input[k].data) + in[k];
#pragma unroll
    for (int k = 0; k < O; ++k) output[k] = static_cast<T*>(plan.output[k].data) + out[k];
    row_grad = static_cast<const A*>(plan.row_grad.data) + grad;
    weight = static_cast<const A*>(plan.weight.data) + w;
    value = static_cast<A*>(plan.value.data) + number;
    // Where neighbours differ in their rows, each looks for its seed.
    if (kStep.noise) noise.seed = seed_of(plan.noise, plan.noise.row.inner == 0 ? noise.row : 0);
  }
};

}  // namespace fastvae
