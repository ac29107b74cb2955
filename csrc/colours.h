// What a loop over pixels is told whose colours are a mixture of discretized logistics: planes of
// numbers, one for each parameter. Plain data, no torch.
#pragma once

#include <cstdint>

#include "formulas/numbers.h"  // for FASTVAE_INLINE: the device asks too
#include "plan.h"

namespace fastvae {

struct Colours {
  Settings settings;  // of it the levels
  double least_log_scale = 0;
  int64_t rows = 0, pixels = 0;
  int components = 0, channels = 0;  // 1 or 3

  // Dense and of one type.
  const void* x = nullptr;           // [rows, channels, pixels]
  const void* parameters = nullptr;  // [rows, planes, pixels]
  const void* weight = nullptr;      // [rows, pixels], of the pixels' values; null: 1 of each
  double* sums = nullptr;            // [rows, chunks of pixels]
  const void* grad = nullptr;        // backward: upstream, [rows]
  void* grad_parameters = nullptr;

  static constexpr int64_t kChunk = 256;
  FASTVAE_INLINE int64_t chunks() const { return (pixels + kChunk - 1) / kChunk; }

  // The planes, in the order of PixelCNN++: the components' logits; then for each channel their
  // means, the logarithms of their scales and, of three channels, one coefficient each.
  FASTVAE_INLINE int each() const { return (channels == 3 ? 3 : 2) * components; }
  FASTVAE_INLINE int planes() const { return components + channels * each(); }
  FASTVAE_INLINE int mean(int channel, int k) const { return components + channel * each() + k; }
  FASTVAE_INLINE int log_scale(int channel, int k) const { return mean(channel, k) + components; }
  FASTVAE_INLINE int coefficient(int channel, int k) const {
    return log_scale(channel, k) + components;
  }
};

}  // namespace fastvae
