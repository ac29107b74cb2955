// Elements and rows past the 2^31st: the loop's index arithmetic in tensors too large to fill.
// Prints "right", or where it is not.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
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
template <class T, DType kType, bool kWide = false>
bool right(int64_t rows, int64_t parts, int64_t inner) {
  using Op = Rsample::Forward;
  const int64_t seed = 0x123456789abcdef, count = rows * parts * inner;
  T* const mu = reserve<T>(count);
  T* const z = reserve<T>(count);
  if (!mu || !z) return printf("no address space\n"), false;
  Plan plan;
  plan.dims = 2;
  plan.size[0] = rows;
  plan.size[1] = parts;
  plan.inner = inner;
  plan.pieces = plan.pieces_per_row = rows * parts;
  plan.input[0] = {mu, {.stride = {parts * inner, inner}, .inner = 1}};
  plan.input[1] = plan.input[0];  // logvar = 0 too
  plan.output[0].write(Mode::full, z);
  plan.output[0].layout = plan.input[0].layout;
  plan.noise.seed = &seed;
  plan.noise.row.stride[0] = 1;
  plan.noise.column = {.stride = {0, inner}, .inner = 1};

  const Cut cut = passes(plan, Op::step, kType)[0].cut;
  if (cut.wide != kWide) return printf("wrong: accesses are not as wide as expected\n"), false;
  const int64_t groups = kBlockThreads >> cut.group_bits;
  plan.pieces_per_row = 1;
  for (const int64_t i : {int64_t(0), count / 2 / inner * inner, count - inner, count - 5}) {
    const int64_t unit = i / inner * cut.segments.divisor + i % inner / cut.segment_size;
    blockIdx.x = unsigned(unit / groups);
    using V = Variant<Op, T, Sums::none, kWide ? kWidth<T> : 1, true, false, false>;
    cuda_on_host::Block::block.run(kBlockThreads, false, [&] { loop<V>(plan, cut); });
    for (int64_t k = i; k < i + 5; ++k) {
      T expected;
      set_element(Accumulate<T>(normal(seed, k / (parts * inner), k % (parts * inner))),
                  cut.bfloat16, &expected);
      if (memcmp(z + k, &expected, sizeof(T)))
        return printf("wrong: element %ld of %ld\n", k, count), false;
    }
  }
  munmap(mu, count * sizeof(T));
  munmap(z, count * sizeof(T));
  return true;
}

}  // namespace

int main() {
  constexpr DType f32 = DType::float32, f64 = DType::float64, f16 = DType::float16;
  const int64_t big = int64_t(1) << 31;
  if (right<float, f32>(3, 1, big + 5) && right<float, f32, true>(3, 1, big + 8) &&
      right<float, f32>(2 * big + 3, 1, 5) && right<float, f32, true>(big + 3, 1, 8) &&
      right<float, f32>(2, big + 3, 6) && right<double, f64>(1, big / 4 + 1, 9) &&
      right<HalfBits, f16>(2, 1, 4 * big + 7) && right<HalfBits, f16, true>(2, 1, 4 * big + 8))
    printf("right\n");
}
