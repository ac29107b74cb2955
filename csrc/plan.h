// What a loop is told: where the operands lie and how the work is cut. Plain data, no torch; the
// same struct drives the CPU loops and is passed to CUDA kernels by value.
//
// The operands' common shape has been collapsed to `dims` outer dimensions and one inner dimension
// of `inner` elements, along which every operand has stride 1 or 0 (0: one value for all of it). A
// point of the outer dimensions is a *piece*. A *row* (what is summed to one number) is a run of
// `pieces_per_row` consecutive pieces. A *unit* is the work of one thread or block: whole pieces of
// one row, or one segment of a piece.
#pragma once

#include <cstdint>

namespace fastvae {

enum class DType : int { float32, float64, bfloat16, float16 };
constexpr int kDTypes = 4;

// What a type is computed and summed in.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// What a step of an op reads and gives. `noise`: it takes a standard normal. `value`: it returns
// the number that is summed over a row. `row_grad`: it takes the upstream gradient of that sum.
struct Step {
  int inputs;
  int outputs;
  bool noise = false;
  bool value = false;
  bool row_grad = false;
  bool slow = false;      // takes long to compute, and many registers
  bool huge = false;      // more than half of those that a GPU's thread can have
  int scale_input = 0;    // > 0: this input is often one number, and the loop looks out for that
  int bounded_input = 0;  // > 0: this input, s of a Gaussian, passes with its gradient through the
                          // loop's bound
};

// What becomes of s before a formula reads it (fastvae/ops/bounds.py), in the order of the kinds:
// ln sigma^2 is kept between two numbers, or s is raised to ln sigma of a sigma with a floor.
enum class Bounding : int { hard, soft, straight_through, tanh, raised, none };

// Of what number s is raised: sigma = e^{s/2}, e^s, s, sqrt(s) or softplus(s), plus the floor.
enum class Raised : int { logvar, log_std, std, var, softplus };

// How the second argument s of a Gaussian is read: ln sigma = factor * s, or factor * ln s.
struct ScaleForm {
  bool logarithmic = true;
  float factor = 0.5f;
  Bounding bounding = Bounding::none;
  Raised raised = Raised::logvar;
  double low = 0, high = 0;  // raised: the floor and its logarithm
};

// Of values that are one of some levels: half the distance of two, its double's logarithm, and
// where the bins of the first and the last level meet their neighbours.
struct Levels {
  double half_width = 0, log_width = 0;
  double first_end = 0, last_begin = 0;
};

// Of counts: whether their means and dispersions are given as logarithms, and whether the gradient
// of the counts themselves is wanted, which takes time and nearly nobody does.
struct Counts {
  bool logarithmic = false;
  bool data_gradient = false;
};

// What the formulas of a call are told beside its operands.
struct Settings {
  ScaleForm scale;
  Levels levels;
  Counts counts;
  double to_q = 1, to_p = 1;  // of the gradient of KL(q || p): by what each side's is multiplied
  bool path = false;          // the path derivative is wanted, without the score
};

constexpr int kMaxDims = 6;
constexpr int kMaxInputs = 5;
constexpr int kMaxOutputs = 4;

// Offsets count elements of the operand's own type.
struct Layout {
  int64_t stride[kMaxDims] = {};
  int64_t inner = 0;
};

struct Input {
  const void* data = nullptr;  // null: every element is `constant`
  Layout layout;
  double constant = 0;
};

enum class Mode : int {
  discard,  // the caller does not want it
  full,     // one element for every element of the common shape
  reduced   // the operand was broadcast: sum into `data`; on the CPU in double, in the slots
            // described below
};

struct Output {
  void* data = nullptr;
  Mode mode = Mode::discard;
  Layout layout;
  // reduced, CPU: elements in one slot's slice; 0 where the slots share a slice, each having
  // elements of its own
  int64_t extent = 0;

  void write(Mode how, void* where) {
    mode = how;
    data = where;
  }
};

// Where an element lies in the noise stream.
struct Noise {
  const int64_t* seed = nullptr;
  bool seed_per_row = false;
  Layout row, column, sample;
};

struct Plan {
  Settings settings;
  int dims = 0;
  int64_t size[kMaxDims] = {};
  int64_t inner = 1;
  int64_t pieces = 1;
  int64_t pieces_per_row = 1;

  int64_t units = 1;
  int64_t units_per_row = 1;
  int64_t pieces_per_unit = 1;  // > 1 only where segments == 1
  int64_t segments = 1;         // of a piece
  int64_t segment_size = 1;     // in elements; the last may be shorter
  // Reduced outputs are accumulated in `slots` slices, each by one thread from its own run of
  // units, and added up in order afterwards: the result does not depend on the number of threads.
  // A run begins at a multiple of `slot_step` units.
  int64_t slots = 0;
  int64_t slot_step = 1;

  Input input[kMaxInputs];
  Output output[kMaxOutputs];
  Input row_grad;  // in accumulation type
  // By which each value is multiplied before it is summed, in accumulation type; data null: by 1.
  // What weighs 0 counts for nothing, even if it is NaN (formulas/weights.h).
  Input weight;
  Output value;  // in accumulation type; `full` where nothing is summed
  // Where rows are summed: accumulation type, one number for each unit (CPU) or row (CUDA).
  void* unit_sums = nullptr;
  Noise noise;
};

}  // namespace fastvae
