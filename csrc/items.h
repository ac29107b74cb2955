// What a loop over items is told: rows of logits, each with one item that was chosen or with how
// often each was. Plain data, no torch.
//
//     ln p = sum_i x_i (l_i - ln sum_j e^{l_j})
#pragma once

#include <cstdint>

namespace fastvae {

struct Items {
  int64_t rows = 0, items = 0;
  // Dense, [rows, items] and of one type; instead of x the chosen items' numbers, [rows].
  const void *logits = nullptr, *x = nullptr;
  const int64_t* chosen = nullptr;
  void* value = nullptr;                           // [rows], in accumulation type
  const void* grad = nullptr;                      // backward: upstream, as `value`
  void *grad_logits = nullptr, *grad_x = nullptr;  // null: not wanted
};

}  // namespace fastvae
