// A call of an op that ends in the logarithm of a sum: over pairs of rows and components
// (../pairs.h), over items (../items.h), or over what the colours of a pixel are a mixture of
// (../colours.h).
#pragma once

#include "run.h"

namespace fastvae {

// Of pairs, z is [..., size], its components are [components, size] and their weights [components];
// of items, logits are [..., items] and x is so too, or [...] of int64; of colours, x is [rows,
// channels, pixels] and parameters [rows, planes, pixels]. Dense copies are made of
// what is not. `name` is that of the operator.
Outputs run_log_sum(const Declaration& op, const char* name, Direction direction,
                    const Tensors& tensors, const Arguments& arguments);

}  // namespace fastvae
