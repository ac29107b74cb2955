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

// rsample of zeros, `rows` rows of `parts` pieces of `inner` elements: z is the noise.
template <class T>
bool right(int64_t rows, int64_t parts, int64_t inner) {
  const int64_t seed = 0x123456789abcdef, count = rows * parts * inner, most = 8192;
  Plan plan;
  plan.dims = 2;
  plan.size[0] = rows;
  plan.size[1] = parts;
  plan.inner = inner;
  plan.pieces = plan.pieces_per_row = rows * parts;
  plan.segments = (inner + most - 1) / most;
  plan.segment_size = plan.segments > 1 ? most : inner;
  plan.units = plan.units_per_row = plan.pieces * plan.segments;
  for (Layout* layout : {&plan.input[0].layout, &plan.output[0].layout})
    *layout = {.stride = {parts * inner, inner}, .inner = 1};
  plan.noise.seed = &seed;
  plan.noise.row.stride[0] = 1;
  plan.noise.column = {.stride = {0, inner}, .inner = 1};
  T* const mu = reserve<T>(count);  // sigma is the number e^0
  T* const z = reserve<T>(count);
  if (!mu || !z) return printf("no address space\n"), false;
  plan.input[0].data = mu;
  plan.output[0].write(Mode::full, z);

  for (const int64_t unit : {int64_t(0), plan.units / 2, plan.units - 1}) {
    for (int thread = 0; thread < kBlockThreads; ++thread)
      unit_part<Rsample::Forward, T>(plan, unit, thread, kBlockThreads);
    const int64_t begin = unit / plan.segments * inner + unit % plan.segments * most;
    for (int64_t i = begin; i < begin + 5; ++i) {  // no segment is shorter
      T expected;
      narrow(Accumulate<T>(normal(seed, i / (parts * inner), i % (parts * inner))), expected);
      if (z[i] != expected) return printf("wrong: element %ld of %ld\n", i, count), false;
    }
  }
  munmap(mu, count * sizeof(T));
  munmap(z, count * sizeof(T));
  return true;
}

}  // namespace

int main() {
  const int64_t big = int64_t(1) << 31;
  if (right<float>(3, 1, big + 5) && right<float>(2 * big + 3, 1, 5) &&
      right<float>(2, big + 3, 6) && right<double>(1, big / 4 + 1, 9) &&
      right<__half>(2, 1, 4 * big + 7))
    printf("right\n");
}
