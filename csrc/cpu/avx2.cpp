#define FASTVAE_TARGET avx2
#include <type_traits>

#include "../formulas/all.h"
#include "loops.h"

namespace fastvae {
const KernelTable kAvx2Kernels = make_table(Steps{});
}
