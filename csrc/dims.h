// Sizes and strides of tensors, as the ops compute with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastvae {

// A vector that never allocates: an op on a small latent costs little more than its calls of
// malloc.
template <class T, int kCapacity>
class InlineVector {
 public:
  InlineVector() {}  // leaves the items as they are
  explicit InlineVector(size_t size, const T& value = T()) { resize(size, value); }
  InlineVector(std::initializer_list<T> items) : InlineVector(items.begin(), items.end()) {}
  template <class Iterator>
  InlineVector(Iterator first, Iterator last) {
    for (; first != last; ++first) push_back(*first);
  }
  InlineVector(const InlineVector& other) : InlineVector(other.begin(), other.end()) {}
  InlineVector& operator=(const InlineVector& other) {
    size_ = other.size_;
    std::copy(other.begin(), other.end(), items_);
    return *this;
  }

  T* begin() { return items_; }
  T* end() { return items_ + size_; }
  const T* begin() const { return items_; }
  const T* end() const { return items_ + size_; }
  const T* data() const { return items_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T& operator[](size_t i) { return items_[i]; }
  const T& operator[](size_t i) const { return items_[i]; }
  T& back() { return items_[size_ - 1]; }
  const T& back() const { return items_[size_ - 1]; }

  void push_back(const T& item) {
    reserve(size_ + 1);
    items_[size_++] = item;
  }
  void resize(size_t size, const T& value = T()) {
    reserve(size);
    for (; size_ < size; ++size_) items_[size_] = value;
    size_ = size;
  }
  template <class Iterator>
  void append(Iterator first, Iterator last) {
    for (; first != last; ++first) push_back(*first);
  }
  // `count` of `value` in front.
  void prepend(size_t count, const T& value) {
    reserve(size_ + count);
    std::copy_backward(begin(), end(), end() + count);
    std::fill_n(items_, count, value);
    size_ += count;
  }

  friend bool operator==(const InlineVector& a, const InlineVector& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

 private:
  static void reserve(size_t size) {
    if (size > size_t(kCapacity))
      throw std::runtime_error("fastvae: more than " + std::to_string(kCapacity) + " dimensions");
  }

  size_t size_ = 0;
  T items_[kCapacity];
};

using Dims = InlineVector<int64_t, 64>;  // PyTorch itself serves no more dimensions

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Dims contiguous_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  int64_t stride = 1;
  for (int d = int(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);  // as PyTorch has it
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
