// Rows of logits: what one chosen item, or how often each was chosen, is worth (../items.h).
#pragma once

#include "../signature.h"
#include "math.h"

namespace fastvae {
inline namespace FASTVAE_TARGET {

struct ChosenLogProb {
  static constexpr Signature signature{.name = "chosen_log_prob",
                                       .operands = {"x", "logits"},
                                       .value = "log_prob",
                                       .loop = Loop::items};
};
struct MultinomialLogProb {
  static constexpr Signature signature{.name = "multinomial_log_prob",
                                       .operands = {"x", "logits"},
                                       .value = "log_prob",
                                       .loop = Loop::items};
};

}  // namespace FASTVAE_TARGET
}  // namespace fastvae
