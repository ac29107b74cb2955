// The CPU's kernels: none, so that no result of this build can come from them.
#include "../../csrc/cpu/kernels.h"

namespace fastvae {
const KernelTable kBaselineKernels = {};
const LogSumTable kBaselineLogSums = {};
}

// The only stream there is. A CPU-only PyTorch has none to give.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
