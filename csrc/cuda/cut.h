// How the threads of a kernel share out a plan. No torch; used on host and device.
//
// A *group* of threads (a part of a warp, a warp, or a block) takes one *unit*: a run of pieces of
// one row, or a segment of each of them. Its threads make *accesses*, of `width` neighbouring
// elements each. Everything here follows from shapes, types and alignment alone, so that a sum has
// one order on every GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "../formulas/all.h"
#include "../plan.h"

namespace fastvae {

constexpr int kWarpBits = 5, kBlockBits = 8;  // logarithms of a warp's and a block's threads
constexpr int kWarp = 1 << kWarpBits, kBlockThreads = 1 << kBlockBits;

// Elements of a wide access: 16 bytes or more, and whole calls of Philox. Doubles have none.
constexpr int width_of(int size) { return size == 2 ? 8 : size == 4 ? 4 : 1; }
template <class T>
constexpr int kWidth = width_of(sizeof(T));

// Accesses, of `width` elements of `size` bytes, of a thread whose loads are under way at once.
// Noise, and what else is slow, takes so long that other warps' loads fill the time; so do eight
// elements of a half type, and a scale whose form is known at run time; and many inputs are many
// loads, as doubles are.
constexpr int accesses_in_flight(const Step& step, int width, int size) {
  const bool slow = step.noise || step.slow || (step.bounded_input > 0 && width == 1);
  return slow || step.inputs > 3 || size != 4 ? 1 : 2;
}

// What becomes of the terms of sums: values of a step, gradients of broadcast operands.
enum class Sums : int {
  none,
  rows,    // one number for each row
  columns  // one for each element of a row's pieces, over the pieces
};

// Which kernels with wide accesses there are. All else goes element by element: forms that are
// rare, and operands that are not aligned or have one value for a whole piece. Of bounds, clamps
// are the ones that large latents have; the others take so many instructions, eight times over,
// that a quarter of all would be theirs.
constexpr bool is_clamp(Bounding bounding) {
  return bounding == Bounding::hard || bounding == Bounding::straight_through;
}
constexpr bool has_wide_kernel(const Step& step, Sums sums, bool logarithmic, bool one_scale,
                               bool bounded) {
  if (bounded && (step.bounded_input == 0 || !logarithmic || sums == Sums::columns)) return false;
  if (one_scale && (step.scale_input == 0 || sums == Sums::columns)) return false;
  // A sum over a row is the gradient of what has one value for a piece, as only a scale may have.
  if (sums == Sums::rows && !step.value && !one_scale) return false;
  // Of a loss, whose elements are all one row.
  if (sums == Sums::none && step.value && step.row_grad) return false;
  if (step.bounded_input == 0) return logarithmic;  // no Gaussian, whose scale has forms
  return logarithmic || sums == (step.value ? Sums::rows : Sums::none);
}

// n / divisor and n % divisor, without a division where n is below 2^31 (Granlund and Montgomery,
// "Division by invariant integers using multiplication", 1994).
struct Divisor {
  int64_t divisor = 1;
  uint32_t multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(d) {
    if (d >= int64_t(1) << 31) return;
    while (int64_t(1) << shift < d) ++shift;
    multiplier = uint32_t((((int64_t(1) << shift) - d) << 32) / d + 1);
  }

  // The quotient; `n` becomes the remainder.
  FASTVAE_INLINE int64_t divide(int64_t& n) const {
    int64_t quotient;
    if (n >= int64_t(1) << 31)
      quotient = n / divisor;
    else if (divisor >= int64_t(1) << 31)
      quotient = 0;
    else
      quotient = (uint32_t(uint64_t(n) * multiplier >> 32) + uint32_t(n)) >> shift;
    n -= quotient * divisor;
    return quotient;
  }
};

// What is known of all units, so that nothing is to be divided where a thread begins.
enum class Units : int {
  any,
  pieces,   // each is one piece
  segments  // each is a segment of the only piece
};

struct Cut {
  bool wide = false;       // accesses have `kWidth` elements, else one
  bool one_scale = false;  // wide: the input `scale_input` has one value for a piece
  bool bfloat16 = false;   // which of the half types, where elements are one
  Units kind = Units::any;
  int64_t units = 1;
  int64_t pieces_per_unit = 1;
  int64_t segment_size = 1;  // in elements; the last of a piece may be shorter
  int parts = 1;             // units whose sums are added up to one result
  int group_bits = 0;        // logarithm of the threads of a group
  int piece_bits = 0;        // logarithm of those that share a piece; the others take other pieces
  Divisor units_per_row, segments, size[kMaxDims];

  // Where parts > 1: the sums of the parts, `partial_sums` for each output that has sums (or the
  // value), and `counters` counters of the parts that are done.
  int64_t partial_sums = 0, counters = 0;
  void* partial[kMaxOutputs] = {};  // accumulation type
  unsigned* counter = nullptr;
};

// One launch: `plan` with its dimensions in the order that `sums` wants.
struct Pass {
  Plan plan;
  Sums sums;
  Cut cut;
};

// Broadcast operands whose gradients sum over the same dimensions share a pass. The first pass
// also gives all other outputs, so mostly it is the only one.
std::vector<Pass> passes(const Plan& plan, const Step& step, DType dtype);

}  // namespace fastvae
