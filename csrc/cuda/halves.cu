#include "loops.cuh"

namespace fastvae {
const CudaColumn kCudaHalves = make_column<HalfBits>(Steps{});
}
