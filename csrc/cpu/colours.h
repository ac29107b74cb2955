// The CPU loop over pixels whose colours are a mixture (../colours.h): sixteen pixels at a time,
// which lie side by side in every plane.
#pragma once

#include <algorithm>
#include <memory>

#include "../formulas/colours.h"
#include "../formulas/weights.h"
#include "kernels.h"
#include "memory.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

template <class T, int kChannels, bool kBackward>
class ColourLoop {
  using V = Vec<T>;
  // Kept of a component.
  struct Kept {
    V logit, log;
    ColourSlopes<V, kBackward ? kChannels : 1> slopes;
  };

 public:
  // Units [begin, end), a chunk of a row's pixels each.
  static void run(const Colours& colours, int64_t begin, int64_t end) {
    const std::unique_ptr<Kept[]> kept(new Kept[size_t(colours.components)]);
    const std::unique_ptr<T[]> padded(new T[size_t((kChannels + 2 * colours.planes()) * kLanes)]);
    const T* weights = static_cast<const T*>(colours.weight);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / colours.chunks(), planes = colours.planes();
      const int64_t first = unit % colours.chunks() * Colours::kChunk;
      const int64_t last = std::min(first + Colours::kChunk, colours.pixels);
      ColourLoop loop(colours, row, kept.get());
      V sum(0);
      for (int64_t pixel = first; pixel < last; pixel += kLanes) {
        const auto from = [&](const void* data, int64_t of_row) {
          return static_cast<const T*>(data) + row * of_row * colours.pixels + pixel;
        };
        const T* x = from(colours.x, kChannels);
        const T* parameters = from(colours.parameters, planes);
        T* gradients = kBackward ? const_cast<T*>(from(colours.grad_parameters, planes)) : nullptr;
        const int n = int(std::min<int64_t>(kLanes, last - pixel));
        const V weight = weights ? load_first(weights + row * colours.pixels + pixel, n,
                                              static_cast<V*>(nullptr))
                                 : V(1);
        if (n == kLanes) {
          sum = sum + loop.compute(x, parameters, gradients, colours.pixels, weight);
          continue;
        }
        // The last are made a whole vector.
        T *of_x = padded.get(), *of_parameters = of_x + kChannels * kLanes;
        T* of_gradients = of_parameters + planes * kLanes;
        copy(x, colours.pixels, of_x, kLanes, kChannels, n);
        copy(parameters, colours.pixels, of_parameters, kLanes, planes, n);
        const V value = loop.compute(of_x, of_parameters, of_gradients, kLanes, weight);
        sum = sum + first_lanes(value, n);
        if (kBackward) copy(of_gradients, kLanes, gradients, colours.pixels, planes, n);
      }
      if (!kBackward) colours.sums[unit] = sum_lanes(sum);
    }
  }

 private:
  ColourLoop(const Colours& colours, int64_t row, Kept* kept)
      : c_(colours), kept_(kept), grad_(kBackward ? static_cast<const T*>(colours.grad)[row] : 0) {}

  // The first `n` numbers of every plane.
  static void copy(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t planes,
                   int n) {
    for (int64_t plane = 0; plane < planes; ++plane)
      std::copy_n(from + plane * from_stride, n, to + plane * to_stride);
  }

  // ln of the sum of exponentials of what is kept of each component.
  V log_sum(V Kept::* of) const {
    V most = kept_[0].*of;
    for (int k = 1; k < c_.components; ++k) most = at_least(most, kept_[k].*of);
    const V shift = shift_of(most);
    V sum(0);
    for (int k = 0; k < c_.components; ++k) sum = sum + share(kept_[k].*of, shift);
    return log_of_sum(shift, sum);
  }

  // The logarithm of the pixels' masses, weighted; or backward, the gradients. Planes are `stride`
  // apart.
  V compute(const T* of_x, const T* parameters, T* gradients, int64_t stride, V weight) const {
    // The planes are too many streams for a processor to see that they go on.
    const auto at = [&](int plane) {
      const T* p = parameters + plane * stride;
      __builtin_prefetch(p + 2 * kLanes);
      return load_same(p);
    };
    V x[kChannels];
    for (int i = 0; i < kChannels; ++i) x[i] = load_same(of_x + i * stride);
    for (int k = 0; k < c_.components; ++k) {
      const ColourComponent<V, kChannels> component(c_, x, k, at);
      kept_[k].logit = at(k);
      if constexpr (kBackward)
        kept_[k].log = kept_[k].logit + component.log_mass(kept_[k].slopes);
      else
        kept_[k].log = kept_[k].logit + component.log_mass();
    }
    const V of_logits = log_sum(&Kept::logit), of_all = log_sum(&Kept::log);
    if constexpr (kBackward) {
      const auto put = [&](int plane, V g) {
        T* p = gradients + plane * stride;
        __builtin_prefetch(p + 2 * kLanes, 1);
        store_same(p, masked(weight, g));
      };
      const V grad = V(grad_) * weight;
      for (int k = 0; k < c_.components; ++k) {
        const V w = share_of_all(kept_[k].log, of_all) * grad;
        put(k, w - share_of_all(kept_[k].logit, of_logits) * grad);
        kept_[k].slopes.gradients(c_, x, k, w, put);
      }
    }
    return weighted(weight, of_all - of_logits);
  }

  const Colours& c_;
  Kept* const kept_;
  const T grad_;
};

template <class T, int kChannels>
void run_colours(const Colours& colours, int64_t begin, int64_t end) {
  if (colours.grad)
    ColourLoop<T, kChannels, true>::run(colours, begin, end);
  else
    ColourLoop<T, kChannels, false>::run(colours, begin, end);
}
// Of one channel and of three; of float32 and float64.
constexpr ColourKernel kColourRows[2][2] = {{run_colours<float, 1>, run_colours<double, 1>},
                                            {run_colours<float, 3>, run_colours<double, 3>}};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
