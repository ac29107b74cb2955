#define FASTVAE_TARGET avx512
#include <type_traits>

#include "../formulas/all.h"
#include "loops.h"

namespace fastvae {
const KernelTable kAvx512Kernels = make_table(Steps{});
}
