// What the loops launch that end in the logarithm of a sum: one kernel after the other on one
// stream.
#include <cstdint>
#include <type_traits>

#include "categoricals.cuh"
#include "colours.cuh"
#include "dispatch.h"
#include "items.cuh"
#include "marginals.cuh"
#include "stream.h"

namespace fastvae {
namespace {

// Launches, until one fails.
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}
  cudaError_t error = cudaSuccess;

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), int64_t blocks, const Args&... args) {
    if (error != cudaSuccess || blocks == 0) return;
    error = blocks > INT32_MAX
                ? cudaErrorInvalidConfiguration
                : launch_kernel(kernel, unsigned(blocks), kBlockThreads, stream_, args...);
  }

 private:
  cudaStream_t stream_;
};

// Calls f with the type as template argument.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f.template operator()<float>();
    case DType::float64:
      return f.template operator()<double>();
    case DType::bfloat16:
      return f.template operator()<__nv_bfloat16>();
    case DType::float16:
      return f.template operator()<__half>();
  }
}

template <class T>
void run_marginals(Launcher& launch, Pairs& p, const Scratch& scratch) {
  p.packed = scratch(Marginals<T>::numbers(p) * int64_t(sizeof(T)));
  p.constants = static_cast<double*>(scratch(marginal_constants(p) * int64_t(sizeof(double))));
  launch(pack_marginals<T>, p.size * kPackBlocks, p);
  const auto add = [&](const double* from, int64_t n, void* to) {
    launch(add_dimensions<T>, ceil_div(n, kBlockThreads), from, n, p.size, static_cast<T*>(to));
  };
  const int64_t row_blocks = MarginalUnit<T>::blocks(p.rows, p.size);
  if (!p.grad) {
    launch(marginal_values<T>, row_blocks, p);
    return add(p.log_sums, p.rows, p.value);
  }
  if (p.grad_log_weights)
    p.of_weights = static_cast<double*>(scratch(p.size * p.components * int64_t(sizeof(double))));
  const bool components = p.grad_mu || p.grad_s || p.grad_log_weights;
  const int64_t of_rows = p.grad_z ? row_blocks : 0;
  const int64_t of_components = components ? MarginalUnit<T>::blocks(p.components, p.size) : 0;
  launch(marginal_gradients<T>, of_rows + of_components, p, of_rows);
  if (p.grad_log_weights) add(p.of_weights, p.components, p.grad_log_weights);
}

// How many rows, or components, a block takes of so many: few while there are not enough blocks for
// a GPU. Doubles need twice the registers.
template <class T, class F>
void with_own(int64_t count, F f) {
  constexpr int64_t kBlocks = 256;
  constexpr bool kFloat = sizeof(T) == 4;
  if (count >= 8 * kBlocks)
    f.template operator()<kFloat ? 8 : 2>();
  else if (count >= 4 * kBlocks)
    f.template operator()<kFloat ? 4 : 2>();
  else if (count >= 2 * kBlocks)
    f.template operator()<2>();
  else
    f.template operator()<1>();
}

template <class T, bool kEach>
void run_pairs(Launcher& launch, Pairs& p, const Scratch& scratch) {
  p.packed = scratch(Sides<T>::numbers(p) * int64_t(sizeof(T)));
  p.constants = static_cast<double*>(scratch(p.components * int64_t(sizeof(double))));
  launch(pack_sides<T>, ceil_div(p.components + p.rows, kBlockThreads / kWarp), p);
  if (!p.grad)
    return with_own<T>(p.rows, [&]<int kOwn>() {
      launch(pair_values<T, kEach, kOwn>, ceil_div(p.rows, kOwn), p);
    });
  const int64_t rows = p.grad_z ? p.rows : 0;
  const int64_t components = p.grad_mu || p.grad_s || p.grad_log_weights ? p.components : 0;
  with_own<T>(rows + components, [&]<int kOwn>() {
    const int64_t of_rows = ceil_div(rows, kOwn), of_components = ceil_div(components, kOwn);
    launch(pair_gradients<T, kEach, kOwn>, of_rows + of_components, p, of_rows, of_components);
  });
}

template <class T>
void run_any(Launcher& launch, PairValue value, Pairs& p, const Scratch& scratch) {
  switch (value) {
    case PairValue::each:
      return run_pairs<T, true>(launch, p, scratch);
    case PairValue::mixture:
      return run_pairs<T, false>(launch, p, scratch);
    case PairValue::marginals:
      return run_marginals<T>(launch, p, scratch);
  }
}

}  // namespace

void run_colours_on_cuda(const char* op, int device, DType dtype, Colours colours, void* value,
                         const Scratch& scratch) {
  Launcher launch(current_stream(op, device));
  const int64_t blocks = colours.rows * colours.chunks();
  colours.sums = static_cast<double*>(scratch(blocks * int64_t(sizeof(double))));
  const auto run = [&]<class T>(T* values) {
    if (colours.channels == 3)
      launch(colour_pixels<T, 3>, blocks, colours);
    else
      launch(colour_pixels<T, 1>, blocks, colours);
    if (!colours.grad)
      launch(add_chunks<T>, ceil_div(colours.rows, kBlockThreads), colours, values);
  };
  if (dtype == DType::float64)
    run(static_cast<double*>(value));
  else
    run(static_cast<float*>(value));
  check(launch.error, op);
}

void run_items_on_cuda(const char* op, int device, DType dtype, const Items& items) {
  Launcher launch(current_stream(op, device));
  with_type(dtype, [&]<class S>() { launch(item_rows<S>, items.rows, items); });
  check(launch.error, op);
}

void run_straight_through_on_cuda(const char* op, int device, DType dtype,
                                  const Categoricals& categoricals) {
  Launcher launch(current_stream(op, device));
  const int64_t blocks =
      ceil_div(categoricals.rows * categoricals.groups, groups_of_block(categoricals.classes));
  with_type(dtype, [&]<class S>() {
    const auto kernel =
        categoricals.grad_sample ? straight_through_gradients<S> : straight_through<S>;
    launch(kernel, blocks, categoricals);
  });
  check(launch.error, op);
}

void run_categorical_kl_on_cuda(const char* op, int device, DType dtype,
                                const Categoricals& categoricals) {
  Launcher launch(current_stream(op, device));
  with_type(dtype, [&]<class S>() {
    const auto run = [&]<int kKept>() {
      const bool mixed = categoricals.mixed();
      launch(mixed ? categorical_kl<S, true, kKept> : categorical_kl<S, false, kKept>,
             categoricals.rows, categoricals);
    };
    if (sizeof(S) < 8 && keeps_classes(categoricals.classes))
      run.template operator()<sizeof(S) < 8 ? kKeptClasses : 0>();
    else
      run.template operator()<0>();
  });
  check(launch.error, op);
}

void run_pairs_on_cuda(const char* op, int device, PairValue value, DType dtype, Pairs pairs,
                       const Scratch& scratch) {
  Launcher launch(current_stream(op, device));
  if (dtype == DType::float64)
    run_any<double>(launch, value, pairs, scratch);
  else
    run_any<float>(launch, value, pairs, scratch);
  check(launch.error, op);
}

}  // namespace fastvae
