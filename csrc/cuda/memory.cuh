// Elements in memory: `N` neighbours, 16 bytes at once, or a single one of any place and type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cut.h"

namespace fastvae {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }

__device__ inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T, int N>
struct Packet {
  static constexpr int kWords = int(N * sizeof(T) / sizeof(uint4));
  T x[N];

  __device__ void load(const T* p) {
    if constexpr (N == 1) {
      x[0] = *p;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(p) + i);
        memcpy(x + i * (N / kWords), &words, sizeof(words));
      }
    }
  }
  __device__ void store(T* p) const {
    if constexpr (N == 1) {
      *p = x[0];
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        uint4 words;
        memcpy(&words, x + i * (N / kWords), sizeof(words));
        reinterpret_cast<uint4*>(p)[i] = words;
      }
    }
  }
};

}  // namespace fastvae
