// Elements and rows past the 2^31st: the loop's index arithmetic in tensors too large to fill.
// Prints "right", or where it is not.
#include <sys/mman.h>

#include <cstdio>
#include <vector>

#include "../../csrc/cuda/loops.cuh"

using namespace fastvae;

namespace {

// Memory of which only what is touched exists.
template <class T>
T* reserve(int64_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
}

float normal(int64_t seed, int64_t row, int64_t column) {
  const Block<uint32_t> counter{{uint32_t(column / 4), uint32_t(row), uint32_t(row >> 32), 0}};
  const auto words = philox(counter, uint32_t(seed), uint32_t(seed >> 32));
  const int pair = column % 4 / 2 * 2;
  const auto x = box_muller<float>(int32_t(words.w[pair]), int32_t(words.w[pair + 1]));
  return column % 2 ? x.second : x.first;
}

// rsample of `rows` rows of `columns` zeros: z is the noise.
template <class T>
bool rows_of_columns(int64_t rows, int64_t columns, int64_t unit_size) {
  const int64_t seed = 0x123456789abcdef;
  Plan plan;
  plan.dims = 1;
  plan.size[0] = plan.pieces = rows;
  plan.inner = columns;
  plan.pieces_per_row = 1;
  plan.segments = plan.units_per_row = (columns + unit_size - 1) / unit_size;
  plan.segment_size = plan.segments > 1 ? unit_size : columns;
  plan.units = rows * plan.segments;
  for (Layout* layout : {&plan.input[0].layout, &plan.output[0].layout}) {
    layout->stride[0] = columns;
    layout->inner = 1;
  }
  plan.input[0].data = reserve<T>(rows * columns);  // mu; sigma is the number e^0
  plan.output[0].write(Mode::full, reserve<T>(rows * columns));
  plan.noise.seed = &seed;
  plan.noise.row.stride[0] = 1;
  plan.noise.column.inner = 1;
  const T* z = static_cast<const T*>(plan.output[0].data);
  if (!plan.input[0].data || !z) return printf("no address space\n"), false;

  for (const int64_t unit : {int64_t(0), plan.units / 2, plan.units - 1}) {
    for (int thread = 0; thread < kBlockThreads; ++thread)
      unit_part<Rsample::Forward, T>(plan, unit, thread, kBlockThreads);
    const int64_t row = unit / plan.segments, first = unit % plan.segments * plan.segment_size;
    const int64_t last = std::min(first + plan.segment_size, columns);
    for (int64_t column = first; column < last; ++column) {
      T expected;
      narrow(Accumulate<T>(normal(seed, row, column)), expected);
      if (z[row * columns + column] == expected) continue;
      printf("wrong: row %lld of %lld, column %lld of %lld\n", (long long)row, (long long)rows,
             (long long)column, (long long)columns);
      return false;
    }
  }
  munmap(const_cast<void*>(plan.input[0].data), rows * columns * sizeof(T));
  munmap(plan.output[0].data, rows * columns * sizeof(T));
  return true;
}

}  // namespace

int main() {
  const int64_t big = int64_t(1) << 31;
  if (rows_of_columns<float>(3, big + 5, 8192) && rows_of_columns<float>(2 * big + 3, 5, 8192) &&
      rows_of_columns<__half>(2, 4 * big + 7, 8192) && rows_of_columns<double>(big / 4, 11, 8192))
    printf("right\n");
}
