#include "loops.cuh"

namespace fastvae {
const CudaColumn kCudaFloat16 = make_column<__half>(Steps{});
}
