#define FASTVAE_TARGET avx512
#include <type_traits>

#include "colours.h"
#include "items.h"
#include "marginals.h"

namespace fastvae {
const LogSumTable kAvx512LogSums = {kPairRows, kItemRow, kColourRows};
}
