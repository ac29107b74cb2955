// Sizes and strides of tensors, as the ops compute with them.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace fastvae {

using Dims = std::vector<int64_t>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Dims contiguous_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  int64_t stride = 1;
  for (int d = int(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return strides;
}

inline std::string text(const Dims& dims) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < dims.size(); ++i) out << (i ? ", " : "") << dims[i];
  out << ']';
  return out.str();
}

template <class Range>
Dims to_dims(const Range& a) {
  return {a.begin(), a.end()};
}

inline int64_t product(const Dims& dims) {
  int64_t n = 1;
  for (int64_t d : dims) n *= d;
  return n;
}

}  // namespace fastvae
