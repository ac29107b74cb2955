#define FASTVAE_TARGET avx2
#include <type_traits>

#include "items.h"
#include "marginals.h"

namespace fastvae {
const LogSumTable kAvx2LogSums = {kPairRows, kItemRow};
}
