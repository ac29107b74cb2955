// The CUDA loops: a map over elements, with the sums that the step asks for.
//
// A thread first issues the loads of all its accesses, then draws their noise, which takes a while,
// and only then looks at what was loaded. It reads and writes 16 bytes at once wherever memory is
// aligned (Cut::wide), and else single elements.
//
// Sums over more than one unit are written unit by unit, and the group that finishes last adds them
// up in double, in the order of the units: one launch, and the same result in every run.
#pragma once

#include "../formulas/weights.h"
#include "kernels.h"
#include "piece.cuh"
#include "sums.cuh"

namespace fastvae {

// ---- Variants ----------------------------------------------------------------------------------

// What is known of a plan when its kernel is compiled. `N` is the width of an access. Kernels of
// single elements leave the rest to run time, and those that sum rows also serve where nothing is
// summed.
template <class Op_, class T_, Sums kSums_, int N_, bool kLogarithmic_, bool kOneScale_,
          bool kBounded_>
struct Variant {
  using Op = Op_;
  using T = T_;
  using A = Accumulate<T>;
  static constexpr Step kStep = Op::step;
  static constexpr Sums kSums = kSums_;
  static constexpr int N = N_, I = kStep.inputs, O = kStep.outputs > 0 ? kStep.outputs : 1;
  static constexpr int K = accesses_in_flight(kStep, N, sizeof(T));
  static constexpr int kScale = kOneScale_ ? kStep.scale_input : -1;  // which input that is

  static constexpr int kBounded = kBounded_ || N == 1 ? kStep.bounded_input : 0;  // or no bound

  // Values that are weighted go one by one (can_be_wide).
  static constexpr bool kWeighted = N == 1 && (kStep.value || kStep.row_grad);

  using Place = Piece<Op, T, (N > 1)>;

  __device__ static Settings settings(const Plan& plan) {
    Settings settings = plan.settings;
    if (N > 1) settings.scale.logarithmic = kLogarithmic_;
    if (N > 1 && kBounded_ && settings.scale.bounding != Bounding::hard)
      settings.scale.bounding = Bounding::straight_through;
    return settings;
  }
  // Stores the value of each element; single elements do so where the plan wants it.
  static constexpr bool kValues = kStep.value && (kSums == Sums::none || N == 1);
  // Blocks that a multiprocessor holds at once, which limits their registers: the fewer operands a
  // thread holds, the more threads can have loads under way.
  static constexpr int kOperands = I + kStep.outputs + int(kValues) + int(kSums == Sums::columns);
  static constexpr bool kOneAtOnce = (sizeof(T) == 2 && kOperands + kBounded_ > 8) ||
                                     (sizeof(T) == 8 && kOperands >= 8) ||
                                     (kStep.huge && sizeof(T) != 4);
  // Gradients of elements, which are loads, stores and little else; a log-probability's, with a
  // clamp, are a register too many, and eight elements of many operands are.
  static constexpr bool kMap = N > 1 && (sizeof(T) == 4 || (sizeof(T) == 2 && kOperands <= 6)) &&
                               kSums == Sums::none && !kStep.noise && !kStep.value &&
                               !(kBounded_ && kStep.scale_input > 0);
  static constexpr int kBlocksAtOnce = kOneAtOnce                     ? 1
                                       : sizeof(T) == 8 || kStep.slow ? 2
                                       : kOperands <= 2 && N > 1      ? 4
                                       : kOperands <= 3 || kMap       ? 3
                                                                      : 2;
};

// What all elements of a piece have in common.
template <class V>
struct Shared {
  using A = typename V::A;
  Bounded<A> scale{0, 1};
  A row_grad = 0;

  template <class Place>
  __device__ Shared(const Plan& plan, const Cut& cut, const Place& piece) {
    if constexpr (V::kScale > 0) {
      const Input& from = plan.input[V::kScale];
      scale.s = from.data ? element(piece.input[V::kScale], cut.bfloat16) : A(from.constant);
      if constexpr (V::kBounded > 0) scale = Scale(V::settings(plan)).bounded(scale.s);
    }
    if (V::kStep.row_grad && plan.row_grad.layout.inner == 0)
      row_grad = plan.row_grad.data ? *piece.row_grad : A(plan.row_grad.constant);
  }
};

// ---- Accesses ----------------------------------------------------------------------------------

// Elements start ... start + N - 1 of a piece.
template <class V>
struct Access {
  using T = typename V::T;
  using A = typename V::A;
  static constexpr int N = V::N, I = V::I, O = V::O;

  Packet<T, N> in[I];
  A terms[O][N], value[N];

  template <class Place>
  __device__ void load(const Plan& plan, const Place& piece, int start) {
#pragma unroll
    for (int k = 0; k < I; ++k) {
      if (k == V::kScale) continue;
      if (N > 1)
        in[k].load(piece.input[k] + start);
      else if (k != V::kStep.scale_input || plan.input[k].data)
        in[k].load(piece.input[k] + start * plan.input[k].layout.inner);
    }
  }

  template <class Place>
  __device__ void compute(const Plan& plan, const Cut& cut, const Place& piece,
                          const Shared<V>& shared, int start) {
    float eps[N] = {};
    if constexpr (V::kStep.noise) draw(plan.noise, piece.noise, start, eps);
    A loaded[I][N];
    // What is slow waits for no branch, but has no register to spare.
    const auto each_input = [&](auto f) {
#pragma unroll
      for (int k = 0; k < I; ++k)
        if (k != V::kScale) f(in[k], loaded[k]);
    };
    if constexpr (V::kStep.slow)
      each_input([&](const auto& from, auto& to) { widen(from, cut.bfloat16, to); });
    else
      as_element<T>(cut.bfloat16, [&]<class Element>(Element) {
        each_input([](const auto& from, auto& to) { widen_as<Element>(from, to); });
      });
    Packet<A, N> grad = {};
    if constexpr (V::kStep.row_grad) {
      if (plan.row_grad.layout.inner != 0) {
        grad.load(piece.row_grad + start);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) grad.x[e] = shared.row_grad;
      }
    }
    A weight = 1;
    if (V::kWeighted && plan.weight.data) {
      weight = piece.weight[start * plan.weight.layout.inner];
      grad.x[0] *= weight;
    }
    const Settings settings = V::settings(plan);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      A x[I], y[O];
#pragma unroll
      for (int k = 0; k < I; ++k) x[k] = k == V::kScale ? shared.scale.s : loaded[k][e];
      if constexpr (N == 1 && V::kStep.scale_input > 0) {
        const Input& from = plan.input[V::kStep.scale_input];
        if (!from.data) x[V::kStep.scale_input] = A(from.constant);
      }
      Bounded<A> bounded = shared.scale;
      if constexpr (V::kBounded > 0) {
        if (V::kScale != V::kBounded) bounded = Scale(settings).bounded(x[V::kBounded]);
        x[V::kBounded] = bounded.s;
      }
      value[e] = V::Op::apply(settings, x, grad.x[e], A(eps[e]), y);
      if (V::kWeighted) value[e] = weighted(weight, value[e]);
      if constexpr (V::kBounded > 0 && V::kBounded < V::kStep.outputs)
        y[V::kBounded] = Scale(settings).bounded_backward(bounded.slope, y[V::kBounded]);
#pragma unroll
      for (int k = 0; k < V::kStep.outputs; ++k) {
        if (V::kWeighted && V::kStep.row_grad) y[k] = weighted_backward(weight, y[k]);
        terms[k][e] = y[k];
      }
    }
  }

  template <class Place>
  __device__ void store(const Plan& plan, const Cut& cut, const Place& piece, int start) const {
    as_element<T>(cut.bfloat16, [&]<class Element>(Element) {
#pragma unroll
      for (int k = 0; k < V::kStep.outputs; ++k) {
        if (plan.output[k].mode != Mode::full) continue;
        Packet<T, N> packet;
        narrow_as<Element>(terms[k], packet);
        packet.store(piece.output[k] + start);
      }
    });
    if constexpr (V::kValues) {
      if (plan.value.mode == Mode::full) {
        Packet<A, N> packet;
#pragma unroll
        for (int e = 0; e < N; ++e) packet.x[e] = value[e];
        packet.store(piece.value + start);
      }
    }
  }
};

// Calls `add` with accesses thread, thread + threads ... of `count`.
template <class V, class Place, class F>
__device__ void make_accesses(const Plan& plan, const Cut& cut, const Place& piece, int count,
                              int thread, int threads, F add) {
  const Shared<V> shared(plan, cut, piece);
  for (int a = thread; a < count; a += V::K * threads) {
    Access<V> access[V::K];
    const auto each = [&](auto f) {
#pragma unroll
      for (int j = 0; j < V::K; ++j)
        if (j == 0 || a + j * threads < count) f(access[j], (a + j * threads) * V::N);
    };
    each([&](Access<V>& access, int start) { access.load(plan, piece, start); });
    each([&](Access<V>& access, int start) {
      access.compute(plan, cut, piece, shared, start);
      access.store(plan, cut, piece, start);
      add(access);
    });
  }
}

// ---- Loops -------------------------------------------------------------------------------------

// Where the sums of output `k` begin that `piece` adds to.
template <class V>
__device__ typename V::T* result(const Plan& plan, const Cut& cut, int k, int64_t piece) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = plan.dims - 1; d >= 0; --d) {
    int64_t index = piece;
    if (d > 0) piece = cut.size[d].divide(index);
    offset += index * plan.output[k].layout.stride[d];
  }
  return static_cast<typename V::T*>(plan.output[k].data) + offset;
}

// A map; with Sums::rows, of each row the sum of the values, or of each output that is reduced.
template <class V>
__global__ void __launch_bounds__(kBlockThreads, V::kBlocksAtOnce)
    loop(const __grid_constant__ Plan plan, const __grid_constant__ Cut cut) {
  using A = typename V::A;
  constexpr int S = V::kSums == Sums::none ? 0 : V::kStep.value ? 1 : V::O;
  const Worker worker(cut);
  const Unit unit(plan, cut, worker.index);
  A sum[S > 0 ? S : 1] = {};
  const auto add = [&](const auto& access) {
#pragma unroll
    for (int k = 0; k < S; ++k)
#pragma unroll
      for (int e = 0; e < access.N; ++e)
        sum[k] += V::kStep.value ? access.value[e] : access.terms[k][e];
  };
  const int threads = 1 << cut.piece_bits, thread = worker.thread & (threads - 1);
  const int accesses = int(unit.last - unit.first) / V::N;
  int64_t p = unit.first_piece + (worker.thread >> cut.piece_bits);
  for (; worker.active && p < unit.last_piece; p += worker.threads >> cut.piece_bits) {
    const typename V::Place piece(plan, cut, p, unit.first);
    make_accesses<V>(plan, cut, piece, accesses, thread, threads, add);
  }

  if constexpr (S > 0) {
    const auto wanted = [&](int k) {
      return V::kStep.value ? plan.value.mode != Mode::full : plan.output[k].mode == Mode::reduced;
    };
    const auto put = [&](int k, auto x) {
      if constexpr (V::kStep.value)
        static_cast<A*>(plan.unit_sums)[unit.row] = A(x);
      else
        set_element(A(x), cut.bfloat16, result<V>(plan, cut, k, unit.row * plan.pieces_per_row));
    };
#pragma unroll
    for (int k = 0; k < S; ++k) {
      if (!wanted(k)) continue;
      sum[k] = group_sum(sum[k], worker.threads);
      if (!worker.active || worker.thread > 0) continue;
      if (cut.parts == 1)
        put(k, sum[k]);
      else
        static_cast<A*>(cut.partial[k])[worker.index] = sum[k];
    }
    if (cut.parts == 1 || !last_to_come(cut.counter + unit.row, cut.parts, worker)) return;
#pragma unroll 1
    for (int k = 0; k < S; ++k) {
      if (!wanted(k)) continue;
      const A* parts = static_cast<const A*>(cut.partial[k]) + unit.row * cut.parts;
      double total = 0;
      for (int i = worker.thread; i < cut.parts; i += worker.threads) total += __ldcg(parts + i);
      total = group_sum(total, worker.threads);
      if (worker.thread == 0) put(k, total);
    }
  }
}

// A map; and of each element of a row's pieces the sum over these pieces, of each output that is
// reduced. A thread keeps to its elements and goes from piece to piece.
template <class V>
__global__ void __launch_bounds__(kBlockThreads, V::kBlocksAtOnce)
    columns_loop(const __grid_constant__ Plan plan, const __grid_constant__ Cut cut) {
  using A = typename V::A;
  const Worker worker(cut);
  const Unit unit(plan, cut, worker.index);
  const int length = int(unit.last - unit.first), start = worker.thread * V::N;
  if (worker.active && start < length) {
    constexpr int K = V::K;
    A sum[V::O][V::N] = {};
    for (int64_t p = unit.first_piece; p < unit.last_piece; p += K) {
      Access<V> access[K];
      const auto each = [&](auto f) {
#pragma unroll
        for (int j = 0; j < K; ++j)
          if (j == 0 || p + j < unit.last_piece)
            f(access[j], typename V::Place(plan, cut, p + j, unit.first));
      };
      each([&](Access<V>& access, const auto& piece) { access.load(plan, piece, start); });
      each([&](Access<V>& access, const auto& piece) {
        access.compute(plan, cut, piece, Shared<V>(plan, cut, piece), start);
        access.store(plan, cut, piece, start);
#pragma unroll
        for (int k = 0; k < V::O; ++k)
#pragma unroll
          for (int e = 0; e < V::N; ++e) sum[k][e] += access.terms[k][e];
      });
    }
    const int64_t column = unit.first + start;
#pragma unroll
    for (int k = 0; k < V::O; ++k) {
      if (plan.output[k].mode != Mode::reduced) continue;
      if (cut.parts == 1) {
        Packet<typename V::T, V::N> packet;
        narrow(sum[k], cut.bfloat16, packet);
        packet.store(result<V>(plan, cut, k, unit.first_piece) + column);
      } else {
        Packet<A, V::N> packet;
        narrow(sum[k], false, packet);
        packet.store(static_cast<A*>(cut.partial[k]) +
                     (unit.row * cut.parts + unit.run) * plan.inner + column);
      }
    }
  }

  if (cut.parts == 1) return;
  unsigned* counter = cut.counter + unit.row * cut.segments.divisor + unit.segment;
  if (!last_to_come(counter, cut.parts, worker)) return;
#pragma unroll 1
  for (int k = 0; k < V::O; ++k) {
    if (plan.output[k].mode != Mode::reduced) continue;
    const A* parts =
        static_cast<const A*>(cut.partial[k]) + unit.row * cut.parts * plan.inner + unit.first;
    for (int i = worker.thread; i < length; i += worker.threads) {
      double total = 0;
      for (int r = 0; r < cut.parts; ++r) total += __ldcg(parts + r * plan.inner + i);
      set_element(A(total), cut.bfloat16,
                  result<V>(plan, cut, k, unit.first_piece) + unit.first + i);
    }
  }
}

// ---- Launch ------------------------------------------------------------------------------------

// Whether values are summed, or gradients of broadcast operands may be.
constexpr bool has_row_sums(const Step& step) { return step.value || step.outputs > 1; }

template <class V>
cudaError_t start(const Plan& plan, const Cut& cut, cudaStream_t stream) {
  const int64_t groups = kBlockThreads >> cut.group_bits;
  const int64_t blocks = (cut.units + groups - 1) / groups;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if constexpr (V::kSums == Sums::columns)
    return launch_kernel(columns_loop<V>, unsigned(blocks), kBlockThreads, stream, plan, cut);
  else
    return launch_kernel(loop<V>, unsigned(blocks), kBlockThreads, stream, plan, cut);
}

template <class Op, class T, Sums kSums>
cudaError_t launch_for(const Plan& plan, const Cut& cut, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const bool bounded = is_clamp(plan.settings.scale.bounding);
  const auto wide = [&]<bool kLogarithmic, bool kOneScale, bool kBounded>() {
    if constexpr (kWidth<T> > 1 &&
                  has_wide_kernel(Op::step, kSums, kLogarithmic, kOneScale, kBounded)) {
      if (plan.settings.scale.logarithmic != kLogarithmic || cut.one_scale != kOneScale ||
          bounded != kBounded)
        return false;
      error = start<Variant<Op, T, kSums, kWidth<T>, kLogarithmic, kOneScale, kBounded>>(plan, cut,
                                                                                         stream);
      return true;
    }
    return false;
  };
  const auto any_wide = [&]<bool kOneScale>() {
    return wide.template operator()<true, kOneScale, false>() ||
           wide.template operator()<true, kOneScale, true>() ||
           wide.template operator()<false, kOneScale, false>();
  };
  if (cut.wide && (any_wide.template operator()<false>() || any_wide.template operator()<true>()))
    return error;
  constexpr Sums kSingle = kSums == Sums::none && has_row_sums(Op::step) ? Sums::rows : kSums;
  return start<Variant<Op, T, kSingle, 1, false, false, false>>(plan, cut, stream);
}

template <class Op, class T>
cudaError_t launch(Sums sums, const Plan& plan, const Cut& cut, cudaStream_t stream) {
  if constexpr (has_row_sums(Op::step))
    if (sums == Sums::rows) return launch_for<Op, T, Sums::rows>(plan, cut, stream);
  if constexpr (has_row_sums(Op::step) && !Op::step.value)
    if (sums == Sums::columns) return launch_for<Op, T, Sums::columns>(plan, cut, stream);
  return launch_for<Op, T, Sums::none>(plan, cut, stream);
}

template <class T, class... S>
struct Launches {
  static constexpr CudaLaunch kAll[] = {launch<S, T>...};
};
template <class T, class... S>
constexpr CudaKernels make_kernels(List<S...>) {
  CudaKernels kernels{};  // nvcc 13 makes no aggregate of a pointer in a return statement
  kernels.launch = Launches<T, S...>::kAll;
  kernels.count = int(sizeof...(S));
  return kernels;
}

}  // namespace fastvae
