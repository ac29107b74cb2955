#include "loops.cuh"

namespace fastvae {
const CudaColumn kCudaFloat64 = make_column<double>(Steps{});
}
