#include "loops.cuh"

namespace fastvae {
const CudaColumn kCudaBFloat16 = make_column<__nv_bfloat16>(Steps{});
}
