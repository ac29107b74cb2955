// The CUDA loops over groups of classes (../categoricals.h): a warp, or the part of one that the
// classes fill, for each group; of KL divergences, a block for each row.
//
// A group is read for the largest logit, for the sums of the exponentials, for the value or for
// what the gradients have in common, and for the gradients: all but the first from a cache. Of KL
// divergences a thread that has few classes keeps what it has computed of each.
#pragma once

#include "../categoricals.h"
#include "../formulas/categoricals.h"
#include "kernels.h"
#include "sums.cuh"

namespace fastvae {

// How many threads have a group of classes together, and how many groups a block then has.
__host__ __device__ inline int threads_of_group(int64_t classes) {
  int threads = 1;
  while (threads < kWarp && threads < classes) threads *= 2;
  return threads;
}
__host__ __device__ inline int groups_of_block(int64_t classes) {
  return kBlockThreads / threads_of_group(classes);
}

// Classes of a thread of which it keeps what it computes: 64 of a group.
constexpr int kKeptClasses = 2;
__host__ __device__ inline bool keeps_classes(int64_t classes) {
  return classes <= kKeptClasses * threads_of_group(classes);
}

// What functions of a class are called with: its number, and which of a thread's own it is, if the
// thread keeps so many.
template <int kKept>
struct ClassThreads {
  int threads, thread;

  __device__ explicit ClassThreads(int64_t classes)
      : threads(threads_of_group(classes)), thread(int(threadIdx.x) % threads) {}

  // Calls f(group) for the groups of a row, by all threads of the block as often; those that are
  // not among the first `groups` must leave nothing behind.
  template <class F>
  __device__ void each_group(int64_t groups, const F& f) const {
    const int64_t at_once = kBlockThreads / threads;
    for (int64_t first = 0; first < groups; first += at_once) f(first + threadIdx.x / threads);
  }

  // Calls f(i, own) for the classes of a thread from `begin` to `end`.
  template <class F>
  __device__ void each_class(int64_t begin, int64_t end, const F& f) const {
    if constexpr (kKept > 0) {
#pragma unroll
      for (int own = 0; own < kKept; ++own)
        if (thread + own * threads < end) f(thread + own * threads, own);
    } else {
      for (int64_t i = begin + thread; i < end; i += threads) f(i, 0);
    }
  }

  // The largest over the classes of what f(i, own) says.
  template <class A, class F>
  __device__ A largest(int64_t classes, const F& f) const {
    A most = -Constants<A>::infinity;
    each_class(0, classes, [&](int64_t i, int own) { most = at_least(most, A(f(i, own))); });
    return group_reduce(most, threads, [](A a, A b) { return a > b ? a : b; });
  }

  // The sums over the classes of what f(i, own) adds to N numbers; in double from chunk to chunk.
  template <class A, int N, class F>
  __device__ void add_up(int64_t classes, double (&sums)[N], const F& f) const {
    const int64_t chunk = int64_t(threads) * 32;
    for (double& sum : sums) sum = 0;
    for (int64_t begin = 0; begin < classes; begin += kKept > 0 ? classes : chunk) {
      A parts[N] = {};
      each_class(begin, min(begin + chunk, classes), [&](int64_t i, int own) { f(i, own, parts); });
#pragma unroll
      for (int k = 0; k < N; ++k) sums[k] += group_sum(parts[k], threads);
    }
  }
};

// What a thread knows of its group, whose logits are relative to the largest; of a group that is
// not there, what it would know of the last.
template <class S>
struct ClassGroup {
  using A = Accumulate<S>;

  const Categoricals& all;
  const ClassThreads<0> own;
  int64_t group;
  bool active;
  const S* logits;
  A top;

  __device__ explicit ClassGroup(const Categoricals& categoricals)
      : all(categoricals), own(categoricals.classes) {
    const int64_t last = all.rows * all.groups - 1;
    group = int64_t(blockIdx.x) * (kBlockThreads / own.threads) + threadIdx.x / own.threads;
    active = group <= last;
    group = min(group, last);
    logits = static_cast<const S*>(all.logits) + group * all.classes;
    top =
        shift_of(own.largest<A>(all.classes, [&](int64_t i, int) { return A(widen(logits[i])); }));
  }

  __device__ A weight(int64_t i) const { return share(A(widen(logits[i])), top); }
};

template <class S>
__global__ void __launch_bounds__(kBlockThreads, 2)
    straight_through(const __grid_constant__ Categoricals all) {
  using A = Accumulate<S>;
  const ClassGroup<S> group(all);
  const ClassThreads<0>& own = group.own;
  const double grid = grid_of(all.classes);
  double total = 0;
  for (int64_t i = own.thread; i < all.classes; i += own.threads)
    total += on_grid(double(group.weight(i)), grid);
  total = group_sum(total, own.threads);
  const Block<uint32_t> words =
      words_of(all.seed, all.seed_per_row, group.group / all.groups, group.group % all.groups / 4);
  const int column = int(group.group % all.groups % 4);
  const uint32_t word = column < 2 ? (column == 0 ? words.w[0] : words.w[1])
                                   : (column == 2 ? words.w[2] : words.w[3]);
  const Draw drawn(word, all.uniform, all.classes);
  const double target = drawn.share * total;
  const bool exists = total > 0;

  // The weights of the classes before, which are summed chunk by chunk.
  double before = 0;
  for (int64_t begin = 0; begin < all.classes; begin += own.threads) {
    const int64_t i = begin + own.thread;
    const bool is_class = i < all.classes;
    const double weight = is_class ? on_grid(double(group.weight(i)), grid) : 0;
    double of_chunk = weight, before_own = before;
    for (int distance = 1; distance < own.threads; distance *= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, of_chunk, distance);
      if (own.thread & distance) before_own += other;
      of_chunk += other;
    }
    const bool chosen =
        drawn.of_all < 0 ? before_own <= target && target < before_own + weight : i == drawn.of_all;
    if (is_class && group.active)
      narrow(exists ? A(chosen) : A(Constants<A>::nan),
             static_cast<S*>(all.sample)[group.group * all.classes + i]);
    before += of_chunk;
  }
}

template <class S>
__global__ void __launch_bounds__(kBlockThreads, 2)
    straight_through_gradients(const __grid_constant__ Categoricals all) {
  using A = Accumulate<S>;
  const ClassGroup<S> group(all);
  const ClassThreads<0>& own = group.own;
  const S* grad = static_cast<const S*>(all.grad_sample) + group.group * all.classes;
  const A largest = own.template largest<A>(all.classes, [&](int64_t i, int) {
    return A(widen(group.logits[i])) == group.top ? A(widen(grad[i])) : -Constants<A>::infinity;
  });
  double sums[2];
  own.template add_up<A>(all.classes, sums, [&](int64_t i, int, A(&parts)[2]) {
    const A weight = group.weight(i);
    parts[0] += weight;
    parts[1] += pull(weight, A(widen(grad[i])), largest);
  });
  if (!group.active) return;
  const A inverse = A(1) / A(sums[0]), of_all = A(sums[1]) * inverse, kept = A(1 - all.uniform);
  S* to = static_cast<S*>(all.grad_logits) + group.group * all.classes;
  for (int64_t i = own.thread; i < all.classes; i += own.threads) {
    const A s = group.weight(i) * inverse;
    narrow(kept * softmax_gradient(s, A(widen(grad[i])), largest, of_all), to[i]);
  }
}

template <class S, bool kMixed, int kKept>
struct CategoricalKLRow {
  using A = Accumulate<S>;
  using Formula = CategoricalKL<kMixed>;
  static constexpr int kSlots = kKept > 0 ? kKept : 1;

  const Categoricals& all;
  const ClassThreads<kKept> own;
  const Mixing<A> mixing;

  __device__ explicit CategoricalKLRow(const Categoricals& categoricals)
      : all(categoricals),
        own(categoricals.classes),
        mixing(categoricals.uniform, categoricals.classes) {}

  __device__ int64_t place(int64_t group) const {
    return (blockIdx.x * all.groups + min(group, all.groups - 1)) * all.classes;
  }

  // Two groups of classes. What is not among a row's groups reads the last one.
  struct Groups {
    const CategoricalKLRow& row;
    const S *logits, *prior_logits;
    TwoGroups<A> two;
    ClassOfTwo<A> kept[kSlots];  // probabilities

    __device__ A of_q(int64_t i) const { return widen(logits[i]); }
    __device__ A of_p(int64_t i) const { return widen(prior_logits[i]); }

    __device__ Groups(const CategoricalKLRow& row, int64_t group)
        : row(row),
          logits(static_cast<const S*>(row.all.logits) + row.place(group)),
          prior_logits(static_cast<const S*>(row.all.prior_logits) + row.place(group)) {
      const int64_t classes = row.all.classes;
      const A q = row.own.template largest<A>(classes, [&](int64_t i, int) { return of_q(i); });
      const A p = row.own.template largest<A>(classes, [&](int64_t i, int) { return of_p(i); });
      two = TwoGroups<A>(q, p);
      double sums[3];
      row.own.template add_up<A>(classes, sums, [&](int64_t i, int own, A(&parts)[3]) {
        const ClassOfTwo<A> c = kept[own] = two.exponentials(of_q(i), of_p(i));
        parts[0] += c.q;
        parts[1] += c.p;
        parts[2] += c.difference;
      });
      two.normalize({sums[0], sums[1], sums[2]});
      if constexpr (kKept > 0)
#pragma unroll
        for (ClassOfTwo<A>& c : kept) c = two.probabilities(c);
    }
    __device__ ClassOfTwo<A> probabilities(int64_t i, int own) const {
      if constexpr (kKept > 0) return kept[own];
      return two.probabilities(two.exponentials(of_q(i), of_p(i)));
    }
  };

  __device__ double value(const Groups& groups) const {
    double sums[1];
    own.template add_up<A>(all.classes, sums, [&](int64_t i, int own, A(&parts)[1]) {
      parts[0] += Formula::value(groups.probabilities(i, own), mixing);
    });
    return sums[0];
  }

  // For all threads of the block.
  __device__ A value() const {
    double sum = 0;
    own.each_group(all.groups, [&](int64_t group) {
      const double of_group = value(Groups(*this, group));
      if (group < all.groups && own.thread == 0) sum += of_group;
    });
    return A(group_sum(sum, kBlockThreads));
  }

  __device__ void gradients(int64_t group, A grad) const {
    const Groups groups(*this, group);
    const TwoGroups<A>& two = groups.two;
    A kept_q[kSlots] = {}, kept_p[kSlots] = {};
    const auto of_q = [&](int64_t i, int own) {
      return kKept > 0 ? kept_q[own] : Formula::of_q(groups.probabilities(i, own), mixing);
    };
    const auto of_p = [&](int64_t i, int own) {
      return kKept > 0 ? kept_p[own] : Formula::of_p(groups.probabilities(i, own), mixing);
    };
    if constexpr (kKept > 0)
      own.each_class(0, all.classes, [&](int64_t, int own) {
        kept_q[own] = Formula::of_q(groups.kept[own], mixing);
        kept_p[own] = Formula::of_p(groups.kept[own], mixing);
      });
    constexpr A kNone = -Constants<A>::infinity;
    const A largest_q = own.template largest<A>(all.classes, [&](int64_t i, int own) {
      return groups.of_q(i) == two.largest_q ? of_q(i, own) : kNone;
    });
    const A largest_p = own.template largest<A>(all.classes, [&](int64_t i, int own) {
      return groups.of_p(i) == two.largest_p ? of_p(i, own) : kNone;
    });
    double sums[2];
    own.template add_up<A>(all.classes, sums, [&](int64_t i, int own, A(&parts)[2]) {
      const ClassOfTwo<A> c = groups.probabilities(i, own);
      parts[0] += pull(c.q, of_q(i, own), largest_q);
      parts[1] += pull(c.p, of_p(i, own), largest_p);
    });
    if (group >= all.groups) return;
    const BalancedUpstream<A> upstream(grad, all.balance);
    const A all_q = A(sums[0]), all_p = A(sums[1]);
    S* to_q = static_cast<S*>(all.grad_logits);
    S* to_p = static_cast<S*>(all.grad_prior_logits);
    own.each_class(0, all.classes, [&](int64_t i, int own) {
      const ClassOfTwo<A> c = groups.probabilities(i, own);
      const int64_t at = place(group) + i;
      if (to_q)
        narrow(upstream.q * softmax_gradient(c.q, of_q(i, own), largest_q, all_q), to_q[at]);
      if (to_p)
        narrow(upstream.p * Formula::gradient_of_p(c.p, of_p(i, own), largest_p, all_p), to_p[at]);
    });
  }
};

template <class S, bool kMixed, int kKept>
__global__ void __launch_bounds__(kBlockThreads, 2)
    categorical_kl(const __grid_constant__ Categoricals all) {
  using A = Accumulate<S>;
  const CategoricalKLRow<S, kMixed, kKept> row(all);
  const A free_nats(all.free_nats);
  const bool needs_value = !all.grad || free_nats > 0;
  const A value = needs_value ? row.value() : A(0);
  if (!all.grad) {
    if (threadIdx.x == 0) static_cast<A*>(all.value)[blockIdx.x] = at_least(free_nats, value);
    return;
  }
  const A grad =
      static_cast<const A*>(all.grad)[blockIdx.x] * factor_of_row(value, free_nats, row.mixing);
  row.own.each_group(all.groups, [&](int64_t group) { row.gradients(group, grad); });
}

}  // namespace fastvae
