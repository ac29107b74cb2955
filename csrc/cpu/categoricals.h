// The CPU loop over groups of classes (../categoricals.h).
//
// A group is read for the largest logit, for the sums of the exponentials, for the value or for
// what the gradients have in common, and for the gradients. What a pass makes of each class is kept
// for the next.
#pragma once

#include <algorithm>

#include "../categoricals.h"
#include "../formulas/categoricals.h"
#include "kernels.h"
#include "memory.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

template <class S>
struct ClassVectors {
  using A = Accumulate<S>;
  using V = Vec<A>;
  static constexpr A kNever = -Constants<A>::infinity;  // the logit of what has no probability

  // Behind the last class there are some without probability.
  FASTVAE_INLINE static V read(const S* logits, int n) {
    const V l = load_first(logits, n, static_cast<V*>(nullptr));
    return n == kLanes ? l : first_lanes(l, n, kNever);
  }

  // The sums over the classes of what f(i, n) adds to N vectors; in double from block to block.
  template <int N, class F>
  static void add_up(int64_t classes, double (&sums)[N], const F& f) {
    constexpr int64_t kBlock = 512;
    for (double& sum : sums) sum = 0;
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      V parts[N];
      for (V& part : parts) part = V(0);
      for_vectors(begin, std::min(begin + kBlock, classes),
                  [&](int64_t i, int n) __attribute__((always_inline)) { f(i, n, parts); });
      for (int k = 0; k < N; ++k) sums[k] += sum_lanes(parts[k]);
    }
  }

  static A largest(const S* logits, int64_t classes) {
    V most(kNever);
    for_vectors(0, classes, [&](int64_t i, int n) __attribute__((always_inline)) {
      most = at_least(most, read(logits + i, n));
    });
    return largest_lane(most);
  }

  // Of the classes with the logit `largest` the largest of some numbers.
  template <class T>
  static A beside(A largest, const S* logits, const T* numbers, int64_t classes) {
    V most(kNever);
    for_vectors(0, classes, [&](int64_t i, int n) __attribute__((always_inline)) {
      const auto found = read(logits + i, n) == V(largest);
      most = at_least(
          most, select(found, load_first(numbers + i, n, static_cast<V*>(nullptr)), V(kNever)));
    });
    return largest_lane(most);
  }
};

// Memory for so many numbers of each class, of several groups at once.
template <class A>
class ClassMemory {
 public:
  ClassMemory(int64_t groups, int64_t classes, int numbers)
      : stride_((classes + kLanes - 1) / kLanes * kLanes),
        size_(groups * stride_),
        data_(new A[size_t(numbers * size_)]) {}
  ~ClassMemory() { delete[] data_; }
  ClassMemory(const ClassMemory&) = delete;
  ClassMemory& operator=(const ClassMemory&) = delete;

  FASTVAE_INLINE A* operator()(int number, int64_t group) const {
    return data_ + number * size_ + group * stride_;
  }

 private:
  int64_t stride_, size_;
  A* data_;
};

template <class S>
class StraightThroughLoop : ClassVectors<S> {
  using Base = ClassVectors<S>;
  using typename Base::A, typename Base::V;
  using Wide = Vec<double>;
  using Base::add_up, Base::beside, Base::largest, Base::read;

 public:
  explicit StraightThroughLoop(const Categoricals& categoricals)
      : all_(categoricals), grid_(grid_of(all_.classes)), weights_(1, all_.classes, 1) {}

  void run_row(int64_t row) const {
    Block<uint32_t> words;
    for (int64_t group = 0; group < all_.groups; ++group) {
      const int64_t place = (row * all_.groups + group) * all_.classes;
      const S* logits = static_cast<const S*>(all_.logits) + place;
      if (all_.grad_sample) {
        gradients(logits, static_cast<const S*>(all_.grad_sample) + place,
                  static_cast<S*>(all_.grad_logits) + place);
        continue;
      }
      if (group % 4 == 0) words = words_of(all_.seed, all_.seed_per_row, row, group / 4);
      draw(logits, words.w[group % 4], static_cast<S*>(all_.sample) + place);
    }
  }

 private:
  A* weights() const { return weights_(0, 0); }
  FASTVAE_INLINE Wide on_grid_of(V weight) const {
    return on_grid(convert(weight, static_cast<Wide*>(nullptr)), Wide(grid_));
  }

  void draw(const S* logits, uint32_t word, S* to) const {
    const int64_t classes = all_.classes;
    const V top(shift_of(largest(logits, classes)));
    Wide sum(0);
    for_vectors(0, classes, [&](int64_t i, int n) __attribute__((always_inline)) {
      const V weight = share(read(logits + i, n), top);
      store_same(weights() + i, weight);
      sum = sum + on_grid_of(weight);
    });
    const double total = sum_lanes(sum);
    const bool exists = total > 0;
    const V others(exists ? A(0) : Constants<A>::nan);
    for_vectors(0, classes, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_first(to + i, others, n);
    });
    if (!exists) return;
    const Draw drawn(word, all_.uniform, classes);
    const int64_t chosen = drawn.of_all < 0 ? find(drawn.share * total) : drawn.of_all;
    store_some(to + chosen, V(1), 1);
  }

  // The class up to which the weights exceed `target`, which all together do.
  int64_t find(double target) const {
    double until = 0;
    int64_t i = 0;
    for (;; i += kLanes) {
      const double next = until + sum_lanes(on_grid_of(load_same(weights() + i)));
      if (next > target) break;
      until = next;
    }
    while ((until += on_grid(double(weights()[i]), grid_)) <= target) ++i;
    return i;
  }

  void gradients(const S* logits, const S* grad, S* to) const {
    const int64_t classes = all_.classes;
    const auto upstream = [&](int64_t i, int n) __attribute__((always_inline)) {
      return load_first(grad + i, n, static_cast<V*>(nullptr));
    };
    const A top = shift_of(largest(logits, classes));
    const V largest_grad(beside(top, logits, grad, classes));
    double sums[2];
    add_up(classes, sums, [&](int64_t i, int n, V(&parts)[2]) __attribute__((always_inline)) {
      const V weight = share(read(logits + i, n), V(top));
      store_same(weights() + i, weight);
      parts[0] = parts[0] + weight;
      parts[1] = parts[1] + pull(weight, upstream(i, n), largest_grad);
    });
    const V inverse(A(1 / sums[0])), all(A(sums[1] / sums[0])), kept(A(1 - all_.uniform));
    for_vectors(0, classes, [&](int64_t i, int n) __attribute__((always_inline)) {
      const V s = load_same(weights() + i) * inverse;
      store_first(to + i, kept * softmax_gradient(s, upstream(i, n), largest_grad, all), n);
    });
  }

  const Categoricals& all_;
  const double grid_;
  const ClassMemory<A> weights_;  // relative to the largest
};

template <class S, bool kMixed>
class CategoricalKLLoop : ClassVectors<S> {
  using Base = ClassVectors<S>;
  using Base::add_up, Base::beside, Base::largest, Base::read;
  using typename Base::A, typename Base::V;
  using Formula = CategoricalKL<kMixed>;
  static constexpr int64_t kMost = 32, kClasses = 1024;  // at once

 public:
  explicit CategoricalKLLoop(const Categoricals& categoricals)
      : all_(categoricals),
        mixing_(categoricals.uniform, categoricals.classes),
        free_nats_(A(categoricals.free_nats)),
        at_once_(std::clamp<int64_t>(
            std::min(kClasses / std::max<int64_t>(1, all_.classes), all_.groups), 1, kMost)),
        memory_(at_once_, categoricals.classes, 4) {}

  void run_row(int64_t row) {
    double value = 0;
    if (!all_.grad || free_nats_ > 0)
      for_groups(row, [&](int64_t place, int64_t count) {
        two_groups(place, count);
        value += value_of(count);
      });
    if (!all_.grad) {
      static_cast<A*>(all_.value)[row] = at_least(free_nats_, A(value));
      return;
    }
    const bool is_kept = free_nats_ > 0 && at_once_ == all_.groups;
    const A grad =
        static_cast<const A*>(all_.grad)[row] * factor_of_row(A(value), free_nats_, mixing_);
    for_groups(row, [&](int64_t place, int64_t count) {
      if (!is_kept) two_groups(place, count);
      gradients(place, count, grad);
    });
  }

 private:
  struct Group {
    const S *q, *p;
    TwoGroups<A> two;
    A largest_q, largest_p, all_q, all_p;
  };

  const S* at(const void* data, int64_t place) const { return static_cast<const S*>(data) + place; }
  S* at(void* data, int64_t place) const { return data ? static_cast<S*>(data) + place : nullptr; }

  // Calls f(place, count) for some groups at a time, of which the first begins at `place`. Each
  // step is made for all of these before the next: in one group it would have to wait for the last.
  template <class F>
  void for_groups(int64_t row, const F& f) {
    for (int64_t group = 0; group < all_.groups; group += at_once_)
      f((row * all_.groups + group) * all_.classes, std::min(at_once_, all_.groups - group));
  }
  template <class F>
  FASTVAE_INLINE void each(int64_t count, const F& f) {
    for (int64_t g = 0; g < count; ++g) f(g, groups_[g]);
  }

  FASTVAE_INLINE void keep(int64_t g, int64_t i, const ClassOfTwo<V>& c) const {
    store_same(memory_(0, g) + i, c.q);
    store_same(memory_(1, g) + i, c.p);
    store_same(memory_(2, g) + i, c.log_ratio);
    store_same(memory_(3, g) + i, c.difference);
  }
  FASTVAE_INLINE V kept(int number, int64_t g, int64_t i) const {
    return load_same(memory_(number, g) + i);
  }

  // Keeps the classes' exponentials.
  void two_groups(int64_t place, int64_t count) {
    each(count, [&](int64_t g, Group& group) __attribute__((always_inline)) {
      group.q = at(all_.logits, place + g * all_.classes);
      group.p = at(all_.prior_logits, place + g * all_.classes);
      group.two = {largest(group.q, all_.classes), largest(group.p, all_.classes)};
    });
    each(count, [&](int64_t g, Group& group) __attribute__((always_inline)) {
      double sums[3];
      const TwoGroups<A> two = group.two;
      add_up(all_.classes, sums,
             [&](int64_t i, int n, V(&parts)[3]) __attribute__((always_inline)) {
               const ClassOfTwo<V> c = two.exponentials(read(group.q + i, n), read(group.p + i, n));
               keep(g, i, c);
               parts[0] = parts[0] + c.q;
               parts[1] = parts[1] + c.p;
               parts[2] = parts[2] + c.difference;
             });
      group.two.normalize({sums[0], sums[1], sums[2]});
    });
  }
  FASTVAE_INLINE ClassOfTwo<V> probabilities(const TwoGroups<A>& two, int64_t g, int64_t i) const {
    const ClassOfTwo<V> c{kept(0, g, i), kept(1, g, i), kept(2, g, i), kept(3, g, i)};
    return two.probabilities(c);
  }

  double value_of(int64_t count) {
    double value = 0;
    each(count, [&](int64_t g, Group& group) __attribute__((always_inline)) {
      double sums[1];
      const TwoGroups<A> two = group.two;
      add_up(all_.classes, sums,
             [&](int64_t i, int n, V(&parts)[1]) __attribute__((always_inline)) {
               const V y = Formula::value(probabilities(two, g, i), mixing_);
               parts[0] = parts[0] + (n == kLanes ? y : first_lanes(y, n));
             });
      value += sums[0];
    });
    return value;
  }

  void gradients(int64_t place, int64_t count, A grad) {
    const int64_t classes = all_.classes;
    each(count, [&](int64_t g, Group& group) __attribute__((always_inline)) {
      const TwoGroups<A> two = group.two;
      for_vectors(0, classes, [&](int64_t i, int) __attribute__((always_inline)) {
        const ClassOfTwo<V> c = probabilities(two, g, i);
        keep(g, i, {c.q, c.p, Formula::of_q(c, mixing_), Formula::of_p(c, mixing_)});
      });
    });
    each(count, [&](int64_t g, Group& group) __attribute__((always_inline)) {
      group.largest_q = beside(group.two.largest_q, group.q, memory_(2, g), classes);
      group.largest_p =
          kMixed ? beside(group.two.largest_p, group.p, memory_(3, g), classes) : A(0);
    });
    each(count, [&](int64_t g, Group& group) __attribute__((always_inline)) {
      const V largest_q(group.largest_q), largest_p(group.largest_p);
      double sums[2];
      add_up(classes, sums, [&](int64_t i, int, V(&parts)[2]) __attribute__((always_inline)) {
        parts[0] = parts[0] + pull(kept(0, g, i), kept(2, g, i), largest_q);
        if constexpr (kMixed) parts[1] = parts[1] + pull(kept(1, g, i), kept(3, g, i), largest_p);
      });
      group.all_q = A(sums[0]);
      group.all_p = A(sums[1]);
    });
    const BalancedUpstream<V> upstream(grad, all_.balance);
    each(count, [&](int64_t g, Group& group) __attribute__((always_inline)) {
      const V largest_q(group.largest_q), largest_p(group.largest_p);
      const V all_q(group.all_q), all_p(group.all_p);
      S* const to_q = at(all_.grad_logits, place + g * classes);
      S* const to_p = at(all_.grad_prior_logits, place + g * classes);
      for_vectors(0, classes, [&](int64_t i, int n) __attribute__((always_inline)) {
        const V of_q = softmax_gradient(kept(0, g, i), kept(2, g, i), largest_q, all_q);
        const V of_p = Formula::gradient_of_p(kept(1, g, i), kept(3, g, i), largest_p, all_p);
        if (to_q) store_first(to_q + i, upstream.q * of_q, n);
        if (to_p) store_first(to_p + i, upstream.p * of_p, n);
      });
    });
  }

  const Categoricals& all_;
  const Mixing<A> mixing_;
  const A free_nats_;
  const int64_t at_once_;
  Group groups_[kMost];
  // Of each class q, p, and what is known of ln(p / q) and p - q.
  const ClassMemory<A> memory_;
};

template <class S>
void run_straight_through(const Categoricals& categoricals, int64_t begin, int64_t end) {
  const StraightThroughLoop<S> loop(categoricals);
  for (int64_t row = begin; row < end; ++row) loop.run_row(row);
}
template <class S>
void run_categorical_kl(const Categoricals& categoricals, int64_t begin, int64_t end) {
  const auto run = [&]<bool kMixed>() {
    CategoricalKLLoop<S, kMixed> loop(categoricals);
    for (int64_t row = begin; row < end; ++row) loop.run_row(row);
  };
  categoricals.mixed() ? run.template operator()<true>() : run.template operator()<false>();
}

constexpr CategoricalKernel kStraightThroughRow[kDTypes] = {
    run_straight_through<float>, run_straight_through<double>, run_straight_through<bfloat16>,
    run_straight_through<float16>};
constexpr CategoricalKernel kCategoricalKLRow[kDTypes] = {
    run_categorical_kl<float>, run_categorical_kl<double>, run_categorical_kl<bfloat16>,
    run_categorical_kl<float16>};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
