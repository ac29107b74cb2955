// What a loop over pairs is told: each of the rows z_b meets each of the components
// N(mu_k, diag sigma_k^2). Plain data, no torch; the same struct drives the CPU loops and is passed
// to CUDA kernels by value.
//
// Nothing of rows times components is ever held, but what is asked for: memory is for the
// components once more, packed for the loop, and for what a thread needs of a few rows, one number
// a component.
#pragma once

#include <cstdint>

#include "plan.h"

namespace fastvae {

enum class PairValue : int {
  each,      // [rows, components]: ln N(z_b; mu_k, sigma_k^2)
  mixture,   // [rows]: ln sum_k w_bk N(z_b; mu_k, sigma_k^2)
  marginals  // [rows]: sum_d ln sum_k w_bk N(z_bd; mu_kd, sigma_kd^2)
};
constexpr int kPairValues = 3;

struct Pairs {
  ScaleForm scale;
  int64_t rows = 0, components = 0, size = 0;  // `size` dimensions
  // ln w_bk is `log_weights`, of the component, and one of these: for k = b, for all others.
  double log_own = 0, log_other = 0;

  // Dense and of one type.
  const void *z = nullptr, *mu = nullptr, *s = nullptr;
  const void* log_weights = nullptr;  // null: all 0
  void* value = nullptr;
  // Backward: the gradients by these; null: not wanted.
  const void* grad = nullptr;  // upstream, by the values
  void *grad_z = nullptr, *grad_mu = nullptr, *grad_s = nullptr, *grad_log_weights = nullptr;

  // Logarithms of each row's sum over components, [rows] or, for marginals, [size, rows]: forward
  // writes them, and backward reads them.
  double* log_sums = nullptr;

  // What the loops need: components, packed; a mixture's constants; marginals' gradients of
  // log_weights, [size, components].
  void* packed = nullptr;
  double *constants = nullptr, *of_weights = nullptr;
  // Backward on the CPU goes over some rows at a time: what these give to each component, and the
  // components' sums so far (null: these are all rows).
  int64_t first_row = 0, last_row = 0;
  void* weights = nullptr;
  double* totals = nullptr;
};

}  // namespace fastvae
