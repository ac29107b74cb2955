// Elements in memory: `N` neighbours, 16 bytes at once, or a single one of any place and type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <type_traits>

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

// An element of either half type. Which of the two, a kernel is told when it runs (Cut::bfloat16):
// kernels of their own would double what there is to compile, for one branch in an access.
struct HalfBits {
  uint16_t bits;
};

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

// Calls f with a number of the type that elements of T are.
template <class T, class F>
__device__ void as_element(bool bfloat16, F f) {
  if constexpr (!std::is_same_v<T, HalfBits>)
    f(T());
  else if (bfloat16)
    f(__nv_bfloat16());
  else
    f(__half());
}

// All elements of an access become what is computed with, and back; `Element` is their type.
template <class Element, class T, int N>
__device__ void widen_as(const Packet<T, N>& from, Accumulate<T> (&to)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) to[e] = widen(std::bit_cast<Element>(from.x[e]));
}
template <class Element, class T, int N>
__device__ void narrow_as(const Accumulate<T> (&from)[N], Packet<T, N>& to) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    Element element;
    narrow(from[e], element);
    to.x[e] = std::bit_cast<T>(element);
  }
}
template <class T, int N>
__device__ void widen(const Packet<T, N>& from, bool bfloat16, Accumulate<T> (&to)[N]) {
  as_element<T>(bfloat16, [&]<class Element>(Element) { widen_as<Element>(from, to); });
}
template <class T, int N>
__device__ void narrow(const Accumulate<T> (&from)[N], bool bfloat16, Packet<T, N>& to) {
  as_element<T>(bfloat16, [&]<class Element>(Element) { narrow_as<Element>(from, to); });
}

template <class T>
__device__ Accumulate<T> element(const T* from, bool bfloat16) {
  Accumulate<T> to[1];
  widen(Packet<T, 1>{{*from}}, bfloat16, to);
  return to[0];
}

template <class T>
__device__ void set_element(Accumulate<T> from, bool bfloat16, T* to) {
  Packet<T, 1> packet;
  narrow({from}, bfloat16, packet);
  *to = packet.x[0];
}

}  // namespace fastvae
