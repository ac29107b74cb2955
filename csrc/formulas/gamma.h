// What is left of the logarithm of the gamma function, and of its derivative, without their leading
// terms. In the vocabulary of math.h, for z > 0; NaN below.
//
// Chebyshev series of 50-digit values, written as polynomials around the middle of their interval;
// largest errors 4e-9 (the slope's 4e-8) and 2e-16 (tests/test_math.py). Between 0 and 1, where
// they end, the recurrence takes one step up.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

constexpr double kTwoPi = 6.283185307179586476925286766559;

// ln Gamma(z) - (z - 1/2) ln z + z - 1/2 ln 2 pi, for 1 / z <= 1
template <class V>
FASTVAE_INLINE V stirling_series(V inverse) {
  const V u = inverse - V(0.5), twelfth = inverse * V(Real<V>(1. / 12));
  if constexpr (sizeof(Real<V>) == sizeof(float)) {
    const float c[] = {0x1.fbfe96p-1f,   -0x1.e3aa90p-6f, -0x1.7d8bdap-6f, 0x1.3d7f7cp-7f,
                       -0x1.8f4f8ep-13f, -0x1.580684p-9f, 0x1.b31c28p-10f};
    return twelfth * polynomial(u, c);
  } else {
    const double c[] = {0x1.fbfe95b5df96fp-1,   -0x1.e3a8de03dd3f0p-6,  -0x1.7d8069c8e732fp-6,
                        0x1.3cfd5a648aed4p-7,   -0x1.fc36e1cffbfeap-13, -0x1.42536e2addbddp-9,
                        0x1.006d094f935d8p-9,   -0x1.5835c0f307e72p-11, -0x1.7959b8858fb88p-12,
                        0x1.a30a26ce6b868p-11,  -0x1.82a11efbae0dep-11, 0x1.8471fba12c11cp-12,
                        0x1.46f2b270949bcp-14,  -0x1.74400240e85bfp-12, 0x1.e04f3ffcfbed9p-12,
                        -0x1.a66151107a085p-11, 0x1.cbcba84624d70p-11,  0x1.595e13b3c64ccp-11,
                        -0x1.e72e8a76a4e65p-10, 0x1.27e72f6651b00p-12,  0x1.908ce9fa2bbb0p-11};
    return twelfth * polynomial(u, c);
  }
}

// ln z - 1 / (2 z) - digamma(z), for 1 / z <= 1
template <class V>
FASTVAE_INLINE V stirling_slope(V inverse) {
  const V u = inverse - V(0.5), twelfth = inverse * inverse * V(Real<V>(1. / 12));
  if constexpr (sizeof(Real<V>) == sizeof(float)) {
    const float c[] = {0x1.f46ff6p-1f,  -0x1.513baap-4f, -0x1.c578b6p-5f, 0x1.3af2d6p-5f,
                       -0x1.d59dcep-8f, -0x1.69febap-7f, 0x1.583a9ap-7f};
    return twelfth * polynomial(u, c);
  } else {
    const double c[] = {
        0x1.f46ff23dd0186p-1,  -0x1.5134897425b7ep-4, -0x1.c5619cc588825p-5, 0x1.3904ec9ccfbb4p-5,
        -0x1.e250e6cc3e802p-8, -0x1.232b5b8c52750p-7, 0x1.7574278a6a9cep-7,  -0x1.b68c26db75e12p-8,
        0x1.732ff26f68f02p-12, 0x1.1a144175f4ccfp-8,  -0x1.89d94f5006f78p-8, 0x1.43f7bb871d58fp-8,
        -0x1.01e3b18ab8238p-9, -0x1.17aba93ea0bffp-9, 0x1.59470e1500e4bp-8,  -0x1.b3e1af8b82447p-9,
        0x1.0b1eb01f905e3p-9,  -0x1.ea876e99eed71p-7, 0x1.c925ff01bf2b4p-7,  0x1.1d22123ab913dp-5,
        -0x1.8a6bc14653db7p-5, -0x1.392bdef2412f2p-6, 0x1.2979215c6c611p-5};
    return twelfth * polynomial(u, c);
  }
}

// z > 0, or one more where it is below 1, so that the series serve.
template <class V>
struct Lifted {
  decltype(V() < V()) lifted;
  V z, inverse;
  V log_step;  // where lifted, ln of what z was over what it is; else 0

  Lifted() = default;
  FASTVAE_INLINE explicit Lifted(V from) : lifted(from < V(1)), log_step(0) {
    z = select(lifted, from + V(1), from);
    inverse = V(1) / z;
    if (any(lifted)) log_step = select(lifted, log(from * inverse), V(0));
  }
};

// ln Gamma(z) - (z - 1/2) ln z + z - 1/2 ln 2 pi, for any z > 0 and 1 / z
template <class V>
FASTVAE_INLINE V stirling(V z, V inverse) {
  const V y = stirling_series(inverse);
  const auto below_1 = z < V(1);
  if (!any(below_1)) return y;
  const Lifted<V> up(z);
  return select(below_1, stirling_series(up.inverse) - fma(z + V(0.5), up.log_step, V(1)), y);
}

// ln z - digamma(z)
template <class V>
FASTVAE_INLINE V digamma_gap(V z) {
  const Lifted<V> up(z);
  const V y = fma(V(0.5), up.inverse, stirling_slope(up.inverse));
  if (!any(up.lifted)) return y;
  return select(up.lifted, y + (up.log_step + V(1) / z), y);
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
