// The CUDA loop over pixels whose colours are a mixture (../colours.h): a thread for each pixel,
// which goes over the components once, or backward twice.
#pragma once

#include "../formulas/colours.h"
#include "../formulas/weights.h"
#include "kernels.h"
#include "log_sum.cuh"

namespace fastvae {

static_assert(Colours::kChunk == kBlockThreads);

template <class T, int kChannels>
__global__ void __launch_bounds__(kBlockThreads, sizeof(T) == 4 ? 2 : 1)
    colour_pixels(const __grid_constant__ Colours c) {
  const int64_t row = blockIdx.x / c.chunks();
  const int64_t pixel = blockIdx.x % c.chunks() * Colours::kChunk + threadIdx.x;
  const bool exists = pixel < c.pixels;
  T value = 0;
  if (exists) {
    const T* parameters = static_cast<const T*>(c.parameters) + row * c.planes() * c.pixels + pixel;
    T x[kChannels];
    for (int i = 0; i < kChannels; ++i)
      x[i] = static_cast<const T*>(c.x)[(row * kChannels + i) * c.pixels + pixel];
    const auto at = [&](int plane) { return parameters[plane * c.pixels]; };
    LogSum<T, T> logits, all;
    for (int k = 0; k < c.components; ++k) {
      const T logit = at(k);
      logits.add(logit);
      all.add(logit + ColourComponent<T, kChannels>(c, x, k, at).log_mass());
    }
    const T of_logits = T(logits.log_sum()), of_all = T(all.log_sum());
    const T weight = c.weight ? static_cast<const T*>(c.weight)[row * c.pixels + pixel] : T(1);
    value = weighted(weight, of_all - of_logits);
    if (c.grad) {
      const T grad = weight * static_cast<const T*>(c.grad)[row];
      T* gradients = static_cast<T*>(c.grad_parameters) + row * c.planes() * c.pixels + pixel;
      for (int k = 0; k < c.components; ++k) {
        const ColourComponent<T, kChannels> component(c, x, k, at);
        const T logit = at(k);
        ColourSlopes<T, kChannels> slopes;
        const T w = share_of_all(logit + component.log_mass(slopes), of_all) * grad;
        const auto put = [&](int plane, T g) { gradients[plane * c.pixels] = masked(weight, g); };
        put(k, w - share_of_all(logit, of_logits) * grad);
        slopes.gradients(c, x, k, w, put);
      }
    }
  }
  if (c.grad) return;
  const double sum = group_sum(double(value), kBlockThreads);
  if (threadIdx.x == 0) c.sums[blockIdx.x] = sum;
}

// A row's sum of its chunks' sums.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    add_chunks(const __grid_constant__ Colours c, T* to) {
  const int64_t row = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (row >= c.rows) return;
  double sum = 0;
  for (int64_t i = 0; i < c.chunks(); ++i) sum += c.sums[row * c.chunks() + i];
  to[row] = T(sum);
}

}  // namespace fastvae
