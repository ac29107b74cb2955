// What a loop over groups of classes is told: rows of groups, each of so many classes, and each
// class with a logit. Plain data, no torch.
//
//     p_i = (1 - u) e^{l_i} / sum_j e^{l_j} + u / classes
#pragma once

#include <cstdint>

namespace fastvae {

struct Categoricals {
  int64_t rows = 0, groups = 0, classes = 0;  // groups: of a row
  double uniform = 0;                         // u: how much of each distribution is uniform

  // Dense, [rows, groups, classes] and of one type.
  const void *logits = nullptr, *prior_logits = nullptr;
  void *grad_logits = nullptr, *grad_prior_logits = nullptr;  // null: not wanted

  // Samples, of a word of the noise stream (formulas/philox.h) for each group, which is a column.
  const int64_t* seed = nullptr;
  bool seed_per_row = false;
  void* sample = nullptr;
  const void* grad_sample = nullptr;  // backward: upstream, as `logits`

  // KL divergences, summed over the groups of a row; what is below `free_nats` counts as these.
  void* value = nullptr;       // [rows], in accumulation type
  const void* grad = nullptr;  // backward: upstream, as `value`
  double free_nats = 0;
  double balance = 0;  // the prior's share of the gradient

  // Whether the uniform part can be seen; where it can, no probability is near 0.
  bool mixed() const { return uniform > 1e-30 * double(classes); }
};

}  // namespace fastvae
