// The CUDA loop over rows of logits (../items.h): a block for each.
#pragma once

#include "../formulas/items.h"
#include "../items.h"
#include "kernels.h"
#include "log_sum.cuh"

namespace fastvae {

template <class S>
__global__ void __launch_bounds__(kBlockThreads, 2) item_rows(const __grid_constant__ Items items) {
  using A = Accumulate<S>;
  const int64_t row = blockIdx.x, n = items.items;
  const S* logits = static_cast<const S*>(items.logits) + row * n;
  const S* x = items.x ? static_cast<const S*>(items.x) + row * n : nullptr;
  LogSum<A, A> sum;
  for (int64_t i = threadIdx.x; i < n; i += kBlockThreads) sum.add(widen(logits[i]));
  sum.combine();
  const double log_sum = sum.log_sum();
  const int64_t chosen = x ? 0 : items.chosen[row];
  const bool exists = x || (chosen >= 0 && chosen < n);
  if (!items.grad) {
    double value = 0;
    if (x)
      for (int64_t i = threadIdx.x; i < n; i += kBlockThreads)
        value += add_log_prob<A>(0, widen(x[i]), widen(logits[i]), log_sum);
    value = group_sum(value, kBlockThreads);
    if (threadIdx.x) return;
    if (!x) value = exists ? log_p(double(widen(logits[chosen])), log_sum) : Constants<double>::nan;
    static_cast<A*>(items.value)[row] = A(value);
    return;
  }
  double count = 1;
  if (x) {
    count = 0;
    for (int64_t i = threadIdx.x; i < n; i += kBlockThreads) count += widen(x[i]);
    count = group_sum(count, kBlockThreads);
  }
  const A grad = exists ? static_cast<const A*>(items.grad)[row] : A(Constants<A>::nan);
  const A all = A(-double(grad) * count);
  for (int64_t i = threadIdx.x; i < n; i += kBlockThreads) {
    const A l = widen(logits[i]);
    if (items.grad_x)
      narrow(log_p_of<A>(widen(x[i]), l, log_sum) * grad,
             static_cast<S*>(items.grad_x)[row * n + i]);
    if (!items.grad_logits) continue;
    const A own = x ? A(widen(x[i]) * grad) : A(0);
    narrow(!x && i == chosen ? gradient_of_chosen(l, log_sum, grad)
                             : gradient_of_logit(l, log_sum, all, own),
           static_cast<S*>(items.grad_logits)[row * n + i]);
  }
}

}  // namespace fastvae
