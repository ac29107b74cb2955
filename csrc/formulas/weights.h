// Values that are weighted before they are summed: sum_i w_i v_i. The loops multiply each element's
// upstream gradient by its weight; what else there is to it stands here.
//
// What weighs 0 is a missing feature, a padded frame, an absent modality: it may hold anything. So
// it is left out, not multiplied, and a gradient of it that is not finite is 0.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

template <class V>
FASTVAE_INLINE V weighted(V weight, V value) {
  return select(weight != V(0), weight * value, V(0));
}

// The gradient of an operand, made with an upstream gradient that was multiplied by the weight.
template <class V>
FASTVAE_INLINE V weighted_backward(V weight, V grad) {
  return select((weight != V(0)) | (grad - grad == V(0)), grad, V(0));
}

// The same of a value that nothing else is to come from, finite or not.
template <class V>
FASTVAE_INLINE V masked(V weight, V grad) {
  return select(weight == V(0), V(0), grad);
}

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
