#define FASTVAE_TARGET baseline
#include <type_traits>

#include "../formulas/all.h"
#include "loops.h"

namespace fastvae {
const KernelTable kBaselineKernels = make_table(Steps{});
}
