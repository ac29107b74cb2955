#define FASTVAE_TARGET avx512
#include <type_traits>

#include "categoricals.h"
#include "colours.h"
#include "items.h"
#include "marginals.h"

namespace fastvae {
const LogSumTable kAvx512LogSums = {kPairRows, kItemRow, kColourRows, kStraightThroughRow,
                                    kCategoricalKLRow};
}
