// One call of an op: its operands are checked, broadcast and collapsed to a Plan, its outputs
// allocated, its kernel chosen by device, instruction set and type. Written once for all ops.
//
//   Call call("rsample_kl", param, bound);
//   call.gaussian("mu", mu, "logvar", logvar, packed_dim);  // inputs, in the order of the struct
//   call.noise(seed);
//   call.rows(event_ndim);
//   Tensor z = call.output(), kl = call.value();            // outputs, in the order of the struct
//   call.run(kernels_of<RsampleKL<2>::Forward>());
//
// The documented checks, with advice, are in fastvae/ops/arguments.py and serve every backend;
// those here keep a direct call of torch.ops.fastvae from reading foreign memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../dims.h"
#include "../plan.h"
#include "run.h"

namespace fastvae {

// Where a tensor lies.
struct Place {
  int32_t device_type = 0, device_index = 0;

  static Place of(const Tensor& tensor);
  bool on_cpu() const;  // and computed there by the CPU's loops
  bool operator==(const Place&) const = default;
};

Tensor empty(const Dims& sizes, const Dims& strides, DType dtype, Place place);

// `bins` levels from `low` to `high`, of op `name`.
Levels levels_of(const char* name, int64_t bins, double low, double high);

// What `param` of op `name` says of a Gaussian's second argument.
ScaleForm scale_form(const char* name, int64_t param);

std::optional<DType> dtype_of(const Tensor& tensor);

using Gradients = InlineVector<Tensor, kMaxOutputs>;

class Call {
 public:
  explicit Call(const char* op, int64_t param = 0, const OptionalBound& bound = std::nullopt);

  void input(const char* name, const Tensor& tensor);
  void constant(double value);
  // Two inputs: the tensors, or the halves of the first along `packed_dim` when `s` is none.
  void gaussian(const char* mu_name, const Tensor& mu, const char* s_name, const OptionalTensor& s,
                int64_t packed_dim);
  // `seed`: an int64 tensor on the inputs' device, one for all or one a row.
  void noise(const Tensor& seed, const Dims& sample_shape = {});
  // Values are `bins` levels from `low` to `high`.
  void levels(int64_t bins, double low, double high);
  // Values are counts; `param` says whether their means are logarithms, `data_gradient` whether the
  // values' own gradient is wanted.
  void counts(int64_t param, bool data_gradient);
  void balance(double share_of_p) {
    plan_.settings.to_q = 1 - share_of_p;
    plan_.settings.to_p = share_of_p;
  }
  void path(bool path) { plan_.settings.path = path; }
  // The last `event_ndim` dimensions are one row, to be summed, each value times its `weight`.
  void rows(int64_t event_ndim, const OptionalTensor& weight);

  // Upstream gradients: of z, an input with the common shape, 0 if not given; of the rows' sums, or
  // one number for all of them.
  void grad_output(const OptionalTensor& grad);
  void grad_value(const OptionalTensor& grad, double number);

  Tensor output();
  Tensor value();
  // Of the first `count` inputs; undefined where `needs` lacks the bit, and for the second of a
  // packed pair, whose gradients are the halves of the first.
  Gradients gradients(int count, int64_t needs);

  bool sums_gradients_on_gpu() const;

  // Multiplies the one input by `factor`, in place, on a GPU.
  void scale(const Tensor& factor);

  void run(const Kernels& kernels) { launch(kernels.index, kernels.step); }

 private:
  // A tensor as the collapse sees it, or positions in the noise stream or among the rows.
  struct Operand {
    const char* name = "";
    OptionalTensor tensor;
    Dims sizes;          // its own
    Dims strides;        // along the common shape, 0 where it is broadcast; set by finish_shape()
    int64_t offset = 0;  // of its first element in `tensor`: the second half of a packed pair
    int packed_dim = -1;
    int64_t trailing = 0;  // dimensions of the common shape that its own end before: the event's
    double constant = 0;   // without a tensor
  };
  struct Gradient {
    Operand operand;  // what the kernel writes
    Tensor result;    // what the caller gets
    // Of a broadcast input. On the CPU the kernel's sums are in slots, which finish() adds up.
    bool reduced = false;
    OptionalTensor slots;
  };

  [[noreturn]] void fail(const std::string& message) const;
  Operand operand(const char* name, const Tensor& tensor) const;
  void check_type(const Operand& operand, DType dtype) const;
  void finish_shape();
  void finish_order();
  Dims spread(const Operand& operand, const Dims& strides) const;
  Dims dense_strides(const Dims& sizes, int64_t trailing = 0) const;
  Tensor allocate(const Dims& sizes, const Dims& strides, DType dtype) const;
  void make_dense(Operand& operand) const;
  void* address(const Operand& operand, DType dtype) const;
  bool collapse(const Step& step);
  void cut(const Step& step);
  bool on_cpu() const { return place_.on_cpu(); }
  void point(Gradient& gradient, Output& output);
  void finish(Gradient& gradient, const Output& output);
  void launch(int step_index, const Step& step);

  const char* op_;
  Plan plan_;
  DType dtype_ = DType::float32, accumulate_ = DType::float32;
  Place place_;

  InlineVector<Operand, kMaxInputs> inputs_;
  std::optional<Operand> weight_, grad_output_, grad_value_, output_, value_;
  InlineVector<std::optional<Gradient>, kMaxOutputs> gradients_;
  OptionalTensor seed_;
  Dims sample_shape_;
  int64_t event_ndim_ = -1;  // -1: the op sums nothing

  bool has_shape_ = false;  // finish_shape() has run
  Dims shape_;              // common, the sample shape in front; set by finish_shape()
  Dims order_;              // of the dimensions in memory, outermost first
  int64_t numel_ = 1;
  int lead_ = 0;       // dimensions before the event
  bool sums_ = false;  // false also where a row has one element
};

}  // namespace fastvae
