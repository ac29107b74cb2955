// How plans are cut: every element belongs to one unit, whatever is broadcast, and the forms that a
// cut can take all occur. Prints "right", or what is wrong.
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>

#include "../../csrc/cuda/piece.cuh"

using namespace fastvae;

namespace {

alignas(16) char memory[16];
std::set<std::string> forms;

bool divides() {
  for (int i = 0; i < 200000; ++i) {
    const auto number = [] {
      return (int64_t(rand()) << 31 | rand()) >> rand() % 62;  // of every size
    };
    const int64_t divisor = number() + 1, n = number();
    int64_t remainder = n;
    const int64_t quotient = Divisor(divisor).divide(remainder);
    if (quotient != n / divisor || remainder != n % divisor)
      return printf("wrong: %ld / %ld\n", n, divisor), false;
  }
  return true;
}

// An operand with one element for all along the dimensions in `same`; the last bit is the inner.
Layout layout(const Plan& plan, unsigned same) {
  Layout result;
  int64_t stride = same >> plan.dims & 1 ? 1 : plan.inner;
  result.inner = same >> plan.dims & 1 ? 0 : 1;
  for (int d = plan.dims - 1; d >= 0; --d) {
    if (same >> d & 1) continue;
    result.stride[d] = stride;
    stride *= plan.size[d];
  }
  return result;
}

// Each element in one unit; each row, and each of its columns, in `parts` of them.
bool covers(const Pass& pass) {
  const Plan& plan = pass.plan;
  const Cut& cut = pass.cut;
  std::vector<int> elements(plan.pieces * plan.inner),
      columns(plan.pieces / plan.pieces_per_row * plan.inner);
  for (int64_t u = 0; u < cut.units; ++u) {
    const Unit unit(plan, cut, u);
    const bool empty = unit.first_piece >= unit.last_piece || unit.first >= unit.last;
    if (empty || unit.row * plan.pieces_per_row > unit.first_piece ||
        unit.last_piece > (unit.row + 1) * plan.pieces_per_row)
      return printf("wrong: unit %ld is empty or not of one row\n", u), false;
    for (int64_t p = unit.first_piece; p < unit.last_piece; ++p)
      for (int64_t i = unit.first; i < unit.last; ++i) ++elements[p * plan.inner + i];
    for (int64_t i = unit.first; i < unit.last; ++i) ++columns[unit.row * plan.inner + i];
  }
  for (int count : elements)
    if (count != 1) return printf("wrong: an element in %d units\n", count), false;
  if (pass.sums == Sums::columns)
    for (int count : columns)
      if (count != cut.parts) return printf("wrong: a column in %d parts\n", count), false;
  if (pass.sums == Sums::rows && cut.units != plan.pieces / plan.pieces_per_row * cut.parts)
    return printf("wrong: rows have another number of parts\n"), false;
  // Threads of a group that is neither a warp's part nor a block cannot meet.
  if (pass.sums != Sums::none && cut.group_bits > kWarpBits && cut.group_bits != kBlockBits)
    return printf("wrong: a group of 2^%d threads\n", cut.group_bits), false;
  const char* sums[] = {"none", "rows", "columns"};
  forms.insert(std::string(sums[int(pass.sums)]) + (cut.wide ? " wide" : " single") +
               (cut.parts > 1 ? " parts" : ""));
  forms.insert("groups of " + std::to_string(1 << cut.group_bits));
  if (pass.sums == Sums::rows && cut.piece_bits < cut.group_bits)
    forms.insert("pieces side by side");
  return true;
}

bool right(std::initializer_list<int64_t> sizes) {
  Plan plan;
  for (const int64_t size : sizes) {
    if (plan.dims + 1 == int(sizes.size())) break;
    plan.size[plan.dims++] = size;
    plan.pieces *= size;
  }
  plan.inner = *(sizes.end() - 1);
  const auto check = [&](const Plan& plan, const Step& step) {
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
      int given = 0;
      for (const Pass& pass : passes(plan, step, dtype)) {
        if (!covers(pass)) return false;
        for (int k = 0; k < step.outputs; ++k) given += pass.plan.output[k].mode != Mode::discard;
      }
      if (given != step.outputs) return printf("wrong: %d outputs are given\n", given), false;
    }
    return true;
  };
  const Step forward = KLDivergence<2>::Forward::step, backward = KLDivergence<2>::Backward::step;
  for (int k = 0; k < 2; ++k) plan.input[k] = {memory, layout(plan, 0)};
  plan.unit_sums = memory;
  int64_t pieces_per_row = 1;
  for (int d = plan.dims; d >= 0; --d) {  // rows of ever more dimensions
    plan.pieces_per_row = pieces_per_row;
    if (!check(plan, forward)) return false;
    if (d > 0) pieces_per_row *= plan.size[d - 1];
  }
  plan.unit_sums = nullptr;
  plan.pieces_per_row = plan.pieces;
  const unsigned all = 2u << plan.dims;
  for (unsigned a = 0; a < all; ++a)
    for (unsigned b = 0; b < all; ++b) {  // both gradients, summed over the dimensions of a and b
      plan.output[0].layout = layout(plan, a);
      plan.output[1].layout = layout(plan, b);
      plan.output[0].write(a ? Mode::reduced : Mode::full, memory);
      plan.output[1].write(b ? Mode::reduced : Mode::full, memory);
      if (!check(plan, backward)) return false;
    }
  return true;
}

}  // namespace

int main() {
  if (!divides()) return 0;
  if (!(right({1}) && right({7}) && right({300000}) && right({600, 3}) && right({5, 16}) &&
        right({200, 40}) && right({3, 100003}) && right({2, 65536}) && right({4, 700, 8}) &&
        right({5, 3, 3000}) && right({3, 5, 4, 6}) && right({100, 1}) && right({700, 128})))
    return 0;
  for (const char* form : {"none single", "none wide", "rows single", "rows wide",
                           "rows single parts", "rows wide parts", "columns single", "columns wide",
                           "columns single parts", "columns wide parts", "groups of 1",
                           "groups of 4", "groups of 32", "groups of 256", "pieces side by side"})
    if (!forms.contains(form)) return printf("wrong: no cut is of the form: %s\n", form), 0;
  printf("right\n");
}
