// The order in which the sums of one output are made one after another. No torch.
#pragma once

#include <vector>

#include "plan.h"

namespace fastvae {

// Puts the dimensions in which `output` has one element for all innermost: those are its rows.
inline Plan rows_of(const Output& output, const Plan& plan) {
  std::vector<int> order;
  Plan result = plan;
  result.pieces_per_row = 1;
  for (const bool reduced : {false, true})
    for (int d = 0; d < plan.dims; ++d)
      if ((output.layout.stride[d] == 0 && plan.size[d] != 1) == reduced) {
        order.push_back(d);
        if (reduced) result.pieces_per_row *= plan.size[d];
      }
  const auto reorder = [&](Layout& layout) {
    const Layout before = layout;
    for (int d = 0; d < plan.dims; ++d) layout.stride[d] = before.stride[order[d]];
  };
  for (int d = 0; d < plan.dims; ++d) result.size[d] = plan.size[order[d]];
  for (Input& input : result.input) reorder(input.layout);
  for (Output& output : result.output) reorder(output.layout);
  for (Layout* layout : {&result.row_grad.layout, &result.weight.layout, &result.value.layout,
                         &result.noise.row, &result.noise.column, &result.noise.sample})
    reorder(*layout);
  return result;
}

}  // namespace fastvae
