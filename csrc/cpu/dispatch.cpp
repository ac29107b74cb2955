#include "dispatch.h"

#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "kernels.h"

namespace fastvae {
namespace {

// A parallel region costs a few microseconds; the caller does less work than this alone.
constexpr int64_t kGrain = 16384;

struct Capability {
  const char* name = "none";
  const KernelTable* kernels = nullptr;
  const LogSumTable* log_sums = nullptr;
};

Capability find_capability() {
  const char* wish = std::getenv("FASTVAE_CPU_CAPABILITY");  // checked in fastvae/backend.py
  const std::string_view most = wish ? wish : "";
  if (most == "none") return {};
#if FASTVAE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && most != "avx2") return {"avx512", &kAvx512Kernels, &kAvx512LogSums};
  if (avx2) return {"avx2", &kAvx2Kernels, &kAvx2LogSums};
  return {};
#else
  return {"baseline", &kBaselineKernels, &kBaselineLogSums};
#endif
}

const Capability& capability() {
  static const Capability found = find_capability();
  return found;
}

// OpenMP's threads do not survive a fork: libgomp would wait for them for ever in the child of a
// process that has used them.
bool threads_survive() {
  static bool lost = false;
#ifndef _WIN32
  static const int watched = pthread_atfork(nullptr, nullptr, [] { lost = true; });
  (void)watched;
#endif
  return !lost;
}

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  threads_survive() ? torch::stable::parallel_for(0, n, grain, f) : f(0, n);
}

// Sums [begin, end). Side by side in memory, many are made at once: one after another they would
// read a cache line for each number.
template <class From, class To>
void add(const void* from, int64_t stride, int64_t count, int64_t step, void* to, int64_t begin,
         int64_t end) {
  constexpr int64_t kAtOnce = 256;
  const int64_t width = stride == 1 ? kAtOnce : 1;
  for (int64_t i = begin; i < end; i += width) {
    const int64_t n = std::min(width, end - i);
    const From* first = static_cast<const From*>(from) + i * stride;
    double sums[kAtOnce];
    std::fill_n(sums, n, 0.0);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t k = 0; k < n; ++k) sums[k] += first[k * stride + j * step];
    for (int64_t k = 0; k < n; ++k) static_cast<To*>(to)[i + k] = To(sums[k]);
  }
}

void run_categoricals(const CategoricalKernel* LogSumTable::* kernels, DType dtype,
                      const Categoricals& categoricals) {
  if (!capability().kernels) throw std::runtime_error("fastvae has no kernels for this processor");
  const CategoricalKernel kernel = (capability().log_sums->*kernels)[int(dtype)];
  const int64_t of_row = std::max<int64_t>(1, categoricals.groups * categoricals.classes);
  parallel_for(categoricals.rows, std::max<int64_t>(1, kGrain / of_row),
               [&](int64_t begin, int64_t end) { kernel(categoricals, begin, end); });
}

}  // namespace

void use_large_pages(void* data, int64_t bytes) {
#ifdef __linux__
  // glibc maps blocks of 32 MiB and more anew each time (mallopt(3), M_MMAP_THRESHOLD): to touch
  // their 4 KiB pages first takes several times as long as any kernel here (measured: 1.7 against
  // 0.5 ns an element for rsample_kl forward).
  constexpr int64_t kMapped = 32 << 20;
  if (bytes < kMapped) return;
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: it may fail
#endif
}

const char* cpu_capability() { return capability().name; }

void run_on_cpu(int step, DType dtype, const Plan& plan) {
  if (!capability().kernels) throw std::runtime_error("fastvae has no kernels for this processor");
  const Kernel kernel = capability().kernels->kernel[step][int(dtype)];
  const int64_t elements = plan.pieces * plan.inner;
  if (plan.slots > 0) {
    // Slot s has steps [s, s + 1) * steps / slots, whoever runs it.
    const int64_t steps = plan.units / plan.slot_step;
    const auto first = [&](int64_t s) { return s * steps / plan.slots * plan.slot_step; };
    const auto slots = [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) kernel(plan, first(s), first(s + 1), s);
    };
    if (plan.slots == 1) return slots(0, 1);
    return parallel_for(plan.slots, 1, slots);
  }
  if (elements <= kGrain) return kernel(plan, 0, plan.units, 0);
  const int64_t unit = std::max<int64_t>(1, elements / plan.units);
  parallel_for(plan.units, std::max<int64_t>(1, kGrain / unit),
               [&](int64_t begin, int64_t end) { kernel(plan, begin, end, 0); });
}

void run_pairs_on_cpu(PairValue value, DType dtype, Pairs pairs, const Scratch& scratch) {
  if (!capability().kernels) throw std::runtime_error("fastvae has no kernels for this processor");
  // Rows whose weights are kept at once, backward: enough for many threads.
  constexpr int64_t kPhase = 256;
  const bool wide = dtype == DType::float64, marginals = value == PairValue::marginals;
  const int64_t bytes = wide ? sizeof(double) : sizeof(float);
  const PairKernels& kernels = capability().log_sums->pairs[int(value)][wide];
  const auto numbers = [&](int64_t n) {
    return static_cast<double*>(scratch(n * int64_t(sizeof(double))));
  };
  const auto all = [&](const PairKernels::Part& part) {
    const int64_t rows = std::max<int64_t>(1, pairs.last_row - pairs.first_row);
    const int64_t work = rows * pairs.components * std::max<int64_t>(1, pairs.size);
    const int64_t units = part.units(pairs), of_each = work / std::max<int64_t>(1, units);
    parallel_for(units, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, of_each)),
                 [&](int64_t begin, int64_t end) { part.run(pairs, begin, end); });
  };
  pairs.last_row = pairs.rows;
  pairs.packed = scratch(kernels.packed_size(pairs) * bytes);
  const int64_t width = (pairs.components + kPanel - 1) / kPanel * kPanel;
  pairs.constants = numbers(marginals ? pairs.size : width);
  if (pairs.grad_log_weights && marginals)
    pairs.of_weights = numbers(pairs.size * pairs.components);
  all(kernels.pack);
  if (marginals) {  // a dimension is one unit
    all(pairs.grad ? kernels.components : kernels.rows);
    const auto add = [&](double* of_dimensions, int64_t n, void* sums) {
      add_on_cpu(DType::float64, of_dimensions, 1, pairs.size, n, dtype, sums, n);
    };
    if (!pairs.grad) add(pairs.log_sums, pairs.rows, pairs.value);
    if (pairs.grad_log_weights) add(pairs.of_weights, pairs.components, pairs.grad_log_weights);
    return;
  }
  if (!pairs.grad) return all(kernels.rows);
  const bool components = pairs.grad_mu || pairs.grad_s || pairs.grad_log_weights;
  pairs.weights = scratch(std::min(kPhase, pairs.rows) * width * bytes);
  if (components && pairs.rows > kPhase)
    pairs.totals = numbers(width / kPanel * kernels.totals(pairs));
  for (int64_t row = 0; row < pairs.rows; row += kPhase) {
    pairs.first_row = row;
    pairs.last_row = std::min(row + kPhase, pairs.rows);
    all(kernels.rows);
    if (components) all(kernels.components);
  }
}

void run_items_on_cpu(DType dtype, const Items& items) {
  if (!capability().kernels) throw std::runtime_error("fastvae has no kernels for this processor");
  const ItemKernel kernel = capability().log_sums->items[int(dtype)];
  parallel_for(items.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, items.items)),
               [&](int64_t begin, int64_t end) { kernel(items, begin, end); });
}

void run_straight_through_on_cpu(DType dtype, const Categoricals& categoricals) {
  run_categoricals(&LogSumTable::straight_through, dtype, categoricals);
}
void run_categorical_kl_on_cpu(DType dtype, const Categoricals& categoricals) {
  run_categoricals(&LogSumTable::categorical_kl, dtype, categoricals);
}

void run_colours_on_cpu(DType dtype, Colours colours, void* value, const Scratch& scratch) {
  if (!capability().kernels) throw std::runtime_error("fastvae has no kernels for this processor");
  const ColourKernel kernel =
      capability().log_sums->colours[colours.channels == 3][dtype == DType::float64];
  const int64_t units = colours.rows * colours.chunks();
  colours.sums = static_cast<double*>(scratch(units * int64_t(sizeof(double))));
  const int64_t work = Colours::kChunk * colours.components * colours.channels;
  parallel_for(units, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)),
               [&](int64_t begin, int64_t end) { kernel(colours, begin, end); });
  if (!colours.grad)
    add_on_cpu(DType::float64, colours.sums, colours.chunks(), colours.chunks(), 1, dtype, value,
               colours.rows);
}

void add_on_cpu(DType from_type, const void* from, int64_t stride, int64_t count, int64_t step,
                DType to_type, void* to, int64_t n) {
  const bool from_double = from_type == DType::float64, to_double = to_type == DType::float64;
  const auto add_types = from_double ? (to_double ? add<double, double> : add<double, float>)
                                     : (to_double ? add<float, double> : add<float, float>);
  parallel_for(
      n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, count)),
      [&](int64_t begin, int64_t end) { add_types(from, stride, count, step, to, begin, end); });
}

}  // namespace fastvae
