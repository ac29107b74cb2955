// As cuda_runtime_api.h: PyTorch's own bfloat16 for CUDA's.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "cuda_runtime_api.h"

using __nv_bfloat16 = c10::BFloat16;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
