#define FASTVAE_TARGET baseline
#include <type_traits>

#include "categoricals.h"
#include "colours.h"
#include "items.h"
#include "marginals.h"

namespace fastvae {
const LogSumTable kBaselineLogSums = {kPairRows, kItemRow, kColourRows, kStraightThroughRow,
                                      kCategoricalKLRow};
}
