// The CPU loop over rows of logits (../items.h).
//
// A row is read twice: for the logarithm of its sum, block by block against the largest so far, and
// then for its value or its gradients, while it is still in cache. Each term of the value is then
// of one sign, x (l - ln sum), and nothing is to cancel.
#pragma once

#include <algorithm>

#include "../formulas/items.h"
#include "../items.h"
#include "kernels.h"
#include "memory.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

template <class S>
class ItemLoop {
  using A = Accumulate<S>;
  using V = Vec<A>;
  using Wide = Vec<double>;
  static constexpr int64_t kBlock = 512;
  static constexpr A kInfinity = Constants<A>::infinity;

 public:
  static void run(const Items& items, int64_t begin, int64_t end) {
    const int64_t n = items.items;
    for (int64_t row = begin; row < end; ++row) {
      const S* logits = static_cast<const S*>(items.logits) + row * n;
      const S* x = items.x ? static_cast<const S*>(items.x) + row * n : nullptr;
      const double log_sum = log_sum_of(logits, n);
      if (!items.grad) {
        A& value = static_cast<A*>(items.value)[row];
        if (x)
          value = A(value_of(logits, x, n, log_sum));
        else
          value = A(log_p(double(number(logits + items.chosen[row])), log_sum));
        continue;
      }
      const A grad = static_cast<const A*>(items.grad)[row];
      if (items.grad_x) gradient_of_x(logits, x, n, log_sum, grad, at(items.grad_x, row * n));
      if (!items.grad_logits) continue;
      S* to = at(items.grad_logits, row * n);
      gradient_of_logits(logits, x, n, log_sum, grad, x ? sum_of(x, n) : 1, to);
      if (x) continue;
      const int64_t chosen = items.chosen[row];
      const A own = gradient_of_chosen(number(logits + chosen), log_sum, grad);
      store_some(to + chosen, V(own), 1);
    }
  }

 private:
  static S* at(void* data, int64_t offset) { return static_cast<S*>(data) + offset; }
  static A number(const S* p) {
    A lanes[kLanes];
    store_same(lanes, load_some(p, 1, static_cast<V*>(nullptr)));
    return lanes[0];
  }

  static V read(const S* p, int n) { return load_first(p, n, static_cast<V*>(nullptr)); }
  static void write(S* p, V x, int n) { store_first(p, x, n); }

  static double log_sum_of(const S* logits, int64_t n) {
    V most(-kInfinity);
    Wide sum(0);
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, n);
      const V before = most;
      for_vectors(begin, end, [&](int64_t i, int m) {
        const V l = read(logits + i, m);
        most = at_least(most, m == kLanes ? l : first_lanes(l, m, -kInfinity));
      });
      const V shift = shift_of(most);
      V part(0);
      for_vectors(begin, end, [&](int64_t i, int m) {
        const V w = share(read(logits + i, m), shift);
        part = part + (m == kLanes ? w : first_lanes(w, m));
      });
      const V scale = share(before, shift);
      sum = sum * convert(scale, static_cast<Wide*>(nullptr)) +
            convert(part, static_cast<Wide*>(nullptr));
    }
    A of_lane[kLanes];
    double sums[kLanes], total = 0;
    store_same(of_lane, most);
    store_same(sums, sum);
    const double largest = *std::max_element(of_lane, of_lane + kLanes);
    for (int k = 0; k < kLanes; ++k)
      if (of_lane[k] != -kInfinity || sums[k] != 0)
        total += sums[k] * share(double(of_lane[k]), largest);
    return log_of_sum(largest, total);
  }

  static double value_of(const S* logits, const S* x, int64_t n, double log_sum) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      V sum(0);
      for_vectors(begin, std::min(begin + kBlock, n), [&](int64_t i, int m) {
        sum = add_log_prob(sum, read(x + i, m), read(logits + i, m), log_sum);
      });
      total += sum_lanes(sum);
    }
    return total;
  }

  static double sum_of(const S* x, int64_t n) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      V sum(0);
      for_vectors(begin, std::min(begin + kBlock, n),
                  [&](int64_t i, int m) { sum = sum + read(x + i, m); });
      total += sum_lanes(sum);
    }
    return total;
  }

  static void gradient_of_x(const S* logits, const S* x, int64_t n, double log_sum, A grad, S* to) {
    for_vectors(0, n, [&](int64_t i, int m) {
      write(to + i, log_p_of(read(x + i, m), read(logits + i, m), log_sum) * V(grad), m);
    });
  }

  static void gradient_of_logits(const S* logits, const S* x, int64_t n, double log_sum, A grad,
                                 double count, S* to) {
    const V all(A(-double(grad) * count));
    for_vectors(0, n, [&](int64_t i, int m) {
      const V own = x ? read(x + i, m) * V(grad) : V(0);
      write(to + i, gradient_of_logit(read(logits + i, m), log_sum, all, own), m);
    });
  }
};

constexpr ItemKernel kItemRow[kDTypes] = {ItemLoop<float>::run, ItemLoop<double>::run,
                                          ItemLoop<bfloat16>::run, ItemLoop<float16>::run};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
