// The CUDA loop over rows of logits (../items.h): a block for each.
//
// A row is read once for its value: what its terms are relative to changes with the largest logit
// so far. Each part of the value is of one sign, x (l - largest) and -n ln sum, and nothing
// cancels.
#pragma once

#include "../formulas/items.h"
#include "../items.h"
#include "kernels.h"
#include "log_sum.cuh"

namespace fastvae {

struct RowOfItems {
  double log_sum, count, value;  // ln of the sum of exponentials; how many items were chosen
};

// What a thread knows of a row: the sum of exponentials, how many items were chosen, and what these
// are worth relative to the largest.
template <class A>
struct ItemSums {
  LogSum<A, A> exponentials;
  Total<A> count, worth;

  template <int N>
  __device__ void add(const A (&l)[N], const A (&x)[N]) {
    A largest = l[0];
#pragma unroll
    for (int e = 1; e < N; ++e) largest = l[e] > largest ? l[e] : largest;
    if (largest > exponentials.largest) {
      if (exponentials.sum != 0) {
        exponentials.sum *= exponentials.scale_to(largest);
        worth.add(add_relative(A(0), A(count.value()), exponentials.largest, largest));
      }
      exponentials.largest = largest;
    }
    largest = shift_of(exponentials.largest);
    A sum = 0, counts = 0, worths = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      sum += exponentials.relative(l[e], largest);
      counts += x[e];
      worths = add_relative(worths, x[e], l[e], largest);
    }
    exponentials.sum += sum;
    count.add(counts);
    worth.add(worths);
  }

  // Of the whole block.
  __device__ RowOfItems combine() {
    const double own = shift_of(exponentials.largest);
    exponentials.combine(kBlockThreads);
    const double all = shift_of(exponentials.largest);
    const double counts = group_sum(count.value(), kBlockThreads);
    const double worths =
        group_sum(add_relative(worth.value(), count.value(), own, all), kBlockThreads);
    return {exponentials.log_sum(), counts,
            value_of_relative(worths, counts, double(exponentials.sum))};
  }
};

template <class S>
__global__ void __launch_bounds__(kBlockThreads, 2) item_rows(const __grid_constant__ Items items) {
  using A = Accumulate<S>;
  const int64_t row = blockIdx.x, n = items.items;
  const S* logits = static_cast<const S*>(items.logits) + row * n;
  const S* x = items.x ? static_cast<const S*>(items.x) + row * n : nullptr;
  S* grad_logits = items.grad_logits ? static_cast<S*>(items.grad_logits) + row * n : nullptr;
  S* grad_x = items.grad_x ? static_cast<S*>(items.grad_x) + row * n : nullptr;

  // Calls f(start) for accesses of N neighbours, 16 bytes where all rows are aligned so.
  constexpr int kWide = kWidth<S>;
  const bool wide = n % kWide == 0 && aligned(logits) && (!x || aligned(x)) &&
                    (!grad_logits || aligned(grad_logits)) && (!grad_x || aligned(grad_x));
  const auto each_access = [&](auto f) {
    const auto go = [&]<int N>() {
      for (int64_t i = int64_t(threadIdx.x) * N; i < n; i += int64_t(kBlockThreads) * N)
        f.template operator()<N>(i);
    };
    if (wide)
      go.template operator()<kWide>();
    else
      go.template operator()<1>();
  };
  const auto read = [&]<int N>(const S* from, int64_t start, A(&to)[N]) {
    Packet<S, N> packet;
    if (from) packet.load(from + start);
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = from ? A(widen(packet.x[e])) : A(0);
  };

  ItemSums<A> sums;
  each_access([&]<int N>(int64_t start) {
    A l[N], count[N];
    read(logits, start, l);
    read(x, start, count);
    sums.add(l, count);
  });
  const RowOfItems of_row = sums.combine();
  const double log_sum = of_row.log_sum;
  const int64_t chosen = x ? 0 : items.chosen[row];
  const bool exists = x || (chosen >= 0 && chosen < n);
  if (!items.grad) {
    if (threadIdx.x) return;
    double value = of_row.value;
    if (!x) value = exists ? log_p(double(widen(logits[chosen])), log_sum) : Constants<double>::nan;
    static_cast<A*>(items.value)[row] = A(value);
    return;
  }
  const A grad = exists ? static_cast<const A*>(items.grad)[row] : A(Constants<A>::nan);
  const A all = A(-double(grad) * (x ? of_row.count : 1));
  each_access([&]<int N>(int64_t start) {
    A l[N], counts[N];
    read(logits, start, l);
    read(x, start, counts);
    Packet<S, N> of_logits, of_x;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      narrow(!x && start + e == chosen ? gradient_of_chosen(l[e], log_sum, grad)
                                       : gradient_of_logit(l[e], log_sum, all, counts[e] * grad),
             of_logits.x[e]);
      if (grad_x) narrow(log_p_of(counts[e], l[e], log_sum) * grad, of_x.x[e]);
    }
    if (grad_logits) of_logits.store(grad_logits + start);
    if (grad_x) of_x.store(grad_x + start);
  });
}

}  // namespace fastvae
