#include <algorithm>
#include <utility>

#include "../dims.h"
#include "../rows.h"
#include "cut.h"

namespace fastvae {
namespace {

// Blocks that fill a large GPU: fewer rows than that are split, if they are long.
constexpr int64_t kManyBlocks = 512;
// Rounds of accesses that a block makes before it is worthwhile to split its row: the parts must be
// counted and added up.
constexpr int64_t kWorthwhile = 4;
// Elements of a unit: what a thread adds up in float32 one after another stays accurate.
constexpr int64_t kMostElements = 1 << 14;
// Pieces that a thread adds up for each of its columns: so few for accuracy, but so many that the
// partial sums are small against what is summed.
constexpr int64_t kMostPieces = 32, kFewPieces = 4;
constexpr int64_t kManyThreads = 1 << 16;
// Threads below which what takes long to compute goes element by element, to make four times as
// many: a large GPU has 2^14 of them compute at once, and each waits for itself half of the time.
constexpr int64_t kBusyThreads = 1 << 15;

int log2_ceil(int64_t n) {
  int bits = 0;
  while (int64_t(1) << bits < n) ++bits;
  return bits;
}

Cut cut_rows(const Plan& plan, bool sums, int width, int at_once) {
  Cut cut;
  const int64_t rows = plan.pieces / plan.pieces_per_row;
  const int64_t rounds_of_piece = ceil_div(plan.inner, width * at_once);  // if one thread did it
  const int64_t rounds = plan.pieces_per_row * rounds_of_piece;
  cut.group_bits = std::min(log2_ceil(rounds), rounds <= 2 * kWarp ? kWarpBits : kBlockBits);
  if (cut.group_bits > kWarpBits) cut.group_bits = kBlockBits;
  cut.piece_bits = std::min(log2_ceil(rounds_of_piece), cut.group_bits);
  int64_t parts = 1;
  if (rounds > (sums ? kWorthwhile : 1) * kBlockThreads) {
    const int64_t enough = ceil_div(kManyBlocks, rows);
    const int64_t most = rounds / kBlockThreads;
    parts =
        std::max(std::min(enough, most), ceil_div(plan.pieces_per_row * plan.inner, kMostElements));
  }
  cut.pieces_per_unit = ceil_div(plan.pieces_per_row, parts);
  int64_t segments = parts > plan.pieces_per_row ? ceil_div(parts, plan.pieces_per_row) : 1;
  // Whole rounds of the block.
  const int64_t round = int64_t(width) * at_once * kBlockThreads;
  cut.segment_size =
      segments > 1 ? ceil_div(ceil_div(plan.inner, segments), round) * round : plan.inner;
  segments = ceil_div(plan.inner, cut.segment_size);
  const int64_t runs = ceil_div(plan.pieces_per_row, cut.pieces_per_unit);
  cut.segments = Divisor(segments);
  cut.units_per_row = Divisor(runs * segments);
  cut.units = rows * runs * segments;
  if (plan.pieces_per_row == 1)
    cut.kind = segments == 1 ? Units::pieces : rows == 1 ? Units::segments : Units::any;
  cut.parts = int(sums ? runs * segments : 1);
  if (cut.parts > 1) {
    cut.partial_sums = cut.units;
    cut.counters = rows;
  }
  return cut;
}

Cut cut_columns(const Plan& plan, int width) {
  Cut cut;
  const int64_t accesses = ceil_div(plan.inner, width);
  const int64_t rows = plan.pieces / plan.pieces_per_row;
  cut.group_bits = cut.piece_bits = std::min(log2_ceil(accesses), kWarpBits);
  cut.segment_size = std::min(plan.inner, int64_t(width) * kWarp);
  const int64_t segments = ceil_div(plan.inner, cut.segment_size);
  const int64_t share = plan.pieces * accesses / kManyThreads;
  const int64_t most = std::clamp(share, kFewPieces, kMostPieces);
  const int64_t runs = ceil_div(plan.pieces_per_row, most);
  cut.pieces_per_unit = ceil_div(plan.pieces_per_row, runs);
  cut.parts = int(ceil_div(plan.pieces_per_row, cut.pieces_per_unit));
  cut.segments = Divisor(segments);
  cut.units_per_row = Divisor(cut.parts * segments);
  cut.units = rows * cut.parts * segments;
  if (cut.parts > 1) {
    cut.partial_sums = rows * cut.parts * plan.inner;
    cut.counters = rows * segments;
  }
  return cut;
}

// Whether it is better to have more threads than wide accesses.
bool has_few_threads(const Plan& plan, int width) {
  const int64_t runs = ceil_div(plan.pieces_per_row, kFewPieces);
  const int64_t rows = plan.pieces / plan.pieces_per_row;
  return rows * runs * ceil_div(plan.inner, width) < kBusyThreads;
}

// Whether the gradients `a` and `b` are sums over the same dimensions.
bool alike(const Output& a, const Output& b, const Plan& plan) {
  bool same = (a.layout.inner == 0) == (b.layout.inner == 0);
  for (int d = 0; d < plan.dims; ++d)
    same &= plan.size[d] == 1 || (a.layout.stride[d] == 0) == (b.layout.stride[d] == 0);
  return same;
}

// Whether every piece can be accessed `width` elements at once.
bool can_be_wide(const Plan& plan, const Step& step, int width, int size, int one_scale) {
  bool wide = plan.inner % width == 0 && !plan.weight.data;
  const auto check = [&](const void* data, const Layout& layout, int size) {
    wide &= layout.inner == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int d = 0; d < plan.dims; ++d) wide &= layout.stride[d] * size % 16 == 0;
  };
  const int sum_size = std::max(size, 4);
  for (int k = 0; k < step.inputs; ++k)
    if (k != one_scale) check(plan.input[k].data, plan.input[k].layout, size);
  for (int k = 0; k < step.outputs; ++k) {
    const Output& output = plan.output[k];
    const bool sums_of_pieces = output.mode == Mode::reduced && output.layout.inner == 0;
    if (output.mode != Mode::discard && !sums_of_pieces) check(output.data, output.layout, size);
  }
  if (step.row_grad && plan.row_grad.layout.inner != 0)
    check(plan.row_grad.data, plan.row_grad.layout, sum_size);
  if (plan.value.mode == Mode::full) check(plan.value.data, plan.value.layout, sum_size);
  if (step.noise) {
    const Noise& noise = plan.noise;
    wide &= noise.column.inner == 1 && noise.row.inner == 0 && noise.sample.inner == 0;
    for (int d = 0; d < plan.dims; ++d) wide &= noise.column.stride[d] % 4 == 0;
  }
  return wide;
}

void cut(Pass& pass, const Step& step, DType dtype) {
  constexpr int sizes[kDTypes] = {4, 8, 2, 2};
  const Plan& plan = pass.plan;
  const int size = sizes[int(dtype)], width = width_of(size);
  const bool one_scale = step.scale_input > 0 && plan.input[step.scale_input].layout.inner == 0;
  const Bounding bounding = plan.settings.scale.bounding;
  const bool wide = width > 1 && (bounding == Bounding::none || is_clamp(bounding)) &&
                    has_wide_kernel(step, pass.sums, plan.settings.scale.logarithmic, one_scale,
                                    is_clamp(bounding)) &&
                    can_be_wide(plan, step, width, size, one_scale ? step.scale_input : -1) &&
                    !(pass.sums == Sums::columns && step.slow && has_few_threads(plan, width));
  const int n = wide ? width : 1;
  pass.cut = pass.sums == Sums::columns
                 ? cut_columns(plan, n)
                 : cut_rows(plan, pass.sums == Sums::rows, n, accesses_in_flight(step, n, size));
  pass.cut.wide = wide;
  pass.cut.one_scale = one_scale;
  pass.cut.bfloat16 = dtype == DType::bfloat16;
  for (int d = 0; d < plan.dims; ++d) pass.cut.size[d] = Divisor(plan.size[d]);
}

}  // namespace

std::vector<Pass> passes(const Plan& plan, const Step& step, DType dtype) {
  std::vector<Pass> result;
  Plan rest = plan;  // what is still to be given
  for (int k = 0; k < step.outputs; ++k) {
    const Output first = rest.output[k];
    if (first.mode != Mode::reduced) continue;
    Pass pass{rest, first.layout.inner == 0 ? Sums::rows : Sums::columns, {}};
    for (int i = k; i < step.outputs; ++i) {
      Output& output = rest.output[i];
      const bool here = output.mode != Mode::reduced || alike(output, first, plan);
      (here ? output : pass.plan.output[i]).mode = Mode::discard;
    }
    for (int i = 0; i < k; ++i) rest.output[i].mode = Mode::discard;
    pass.plan = rows_of(first, pass.plan);
    result.push_back(pass);
  }
  if (result.empty()) {
    result.push_back({plan, plan.unit_sums ? Sums::rows : Sums::none, {}});
    if (!plan.unit_sums) result[0].plan.pieces_per_row = 1;  // rows mean nothing: any cut serves
  }
  for (Pass& pass : result) cut(pass, step, dtype);
  return result;
}

}  // namespace fastvae
