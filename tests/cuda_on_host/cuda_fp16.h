// As cuda_runtime_api.h: PyTorch's own half for CUDA's.
#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime_api.h"

using __half = c10::Half;
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
