#include "loops.cuh"

namespace fastvae {
const CudaColumn kCudaFloat32 = make_column<float>(Steps{});
}
