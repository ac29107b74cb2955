// The second half of a Call: its operands become a Plan, and the plan is run.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cuda/dispatch.h"
#include "../rows.h"
#include "call.h"

namespace fastvae {
namespace {

// Elements of a unit: enough to pay for handing it to a thread, few enough to share out a long row.
constexpr int64_t kUnit = 8192;
// Slices in which a broadcast operand's gradient is accumulated: the parallelism of that case. Each
// is of at least `kUnit` elements, and of several times the gradient's, which is added once more
// for it.
constexpr int64_t kMaxSlots = 64, kGradientsPerSlot = 4;
// Or a slot sums whole rows of the largest such gradient, if there are so many to share out and
// each fills the kernel's blocks.
constexpr int64_t kEnoughRows = 16, kLongRow = 512;

}  // namespace

void* Call::address(const Operand& operand, DType dtype) const {
  constexpr int64_t sizes[kDTypes] = {4, 8, 2, 2};
  return static_cast<char*>(operand.tensor->data_ptr()) + operand.offset * sizes[int(dtype)];
}

// ---- Collapse -----------------------------------------------------------------------------------

// Fills the plan's dimensions and layouts. Operands whose innermost stride is neither 0 nor 1 are
// replaced by dense copies; then the answer is false, and the collapse must be made again.
bool Call::collapse(const Step& step) {
  struct Column {
    Dims strides;
    Layout* layout = nullptr;
    Operand* operand = nullptr;  // none: not in memory
    bool output = false;
    Dims collapsed = {};  // strides of the collapsed dimensions
  };
  InlineVector<Column, kMaxInputs + kMaxOutputs + 7> columns;
  const size_t rank = shape_.size();
  for (size_t k = 0; k < inputs_.size(); ++k)
    if (inputs_[k].tensor)
      columns.push_back({inputs_[k].strides, &plan_.input[k].layout, &inputs_[k]});
  if (output_) columns.push_back({output_->strides, &plan_.output[0].layout, &*output_});
  for (size_t k = 0; k < gradients_.size(); ++k)
    if (gradients_[k])
      columns.push_back(
          {gradients_[k]->operand.strides, &plan_.output[k].layout, &gradients_[k]->operand, true});
  if (grad_value_) columns.push_back({grad_value_->strides, &plan_.row_grad.layout, &*grad_value_});
  if (weight_) columns.push_back({weight_->strides, &plan_.weight.layout, &*weight_});

  const Dims event(shape_.end() - std::max<int64_t>(event_ndim_, 0), shape_.end());
  sums_ = step.value && product(event) != 1;
  Layout rows;
  if (step.value && !sums_) columns.push_back({value_->strides, &plan_.value.layout, &*value_});
  if (sums_) {
    Dims strides = contiguous_strides(Dims(shape_.begin(), shape_.end() - event_ndim_));
    strides.resize(rank, 0);
    columns.push_back({strides, &rows, nullptr});
  }
  if (step.noise) {
    const size_t samples = sample_shape_.size();
    Dims sample(rank, 0), row(rank, 0), column(rank, 0);
    std::ranges::copy(contiguous_strides(sample_shape_), sample.begin());
    if (rank > samples) {
      row[samples] = 1;
      std::ranges::copy(contiguous_strides(Dims(shape_.begin() + samples + 1, shape_.end())),
                        column.begin() + samples + 1);
    }
    columns.push_back({sample, &plan_.noise.sample, nullptr});
    columns.push_back({row, &plan_.noise.row, nullptr});
    columns.push_back({column, &plan_.noise.column, nullptr});
  }

  // Neighbouring dimensions are one where every operand walks through them in one stride.
  Dims sizes;
  const auto add_dimension = [&](int64_t size, const auto& stride_of) {
    sizes.push_back(size);
    for (Column& column : columns) column.collapsed.push_back(stride_of(column));
  };
  for (const int64_t d : order_) {
    if (shape_[d] == 1) continue;
    const auto continues = [&](const Column& column) {
      return column.collapsed.back() == column.strides[d] * shape_[d];
    };
    if (!sizes.empty() && std::ranges::all_of(columns, continues)) {
      sizes.back() *= shape_[d];
      for (Column& column : columns) column.collapsed.back() = column.strides[d];
    } else {
      add_dimension(shape_[d], [d](const Column& column) { return column.strides[d]; });
    }
  }
  const auto no_stride = [](const Column&) { return int64_t(0); };
  if (sizes.empty()) add_dimension(1, no_stride);
  // The gradients of packed halves of one element each lie two apart. They cannot be replaced by a
  // dense copy as an input can: every element is then a piece of its own.
  if (std::ranges::any_of(columns, [](const Column& column) {
        return column.output && column.collapsed.back() > 1;
      }))
    add_dimension(1, no_stride);
  const bool too_many = sizes.size() > kMaxDims + 1;
  bool done = true;
  for (const Column& column : columns) {
    Operand* operand = column.operand;
    const int64_t inner = column.collapsed.back();
    if (!operand || (!too_many && (inner == 0 || inner == 1))) continue;
    if (operand->strides == spread(*operand, dense_strides(operand->sizes, operand->trailing)))
      continue;
    make_dense(*operand);
    done = false;
  }
  if (!done) return false;
  if (too_many) fail("the operands broadcast along too many alternating dimensions");

  plan_.dims = int(sizes.size()) - 1;
  plan_.inner = sizes.back();
  plan_.pieces = plan_.pieces_per_row = 1;
  for (const Column& column : columns) {
    for (int d = 0; d < plan_.dims; ++d) column.layout->stride[d] = column.collapsed[d];
    column.layout->inner = column.collapsed.back();
  }
  for (int d = 0; d < plan_.dims; ++d) {
    plan_.size[d] = sizes[d];
    plan_.pieces *= sizes[d];
    if (sums_ && rows.stride[d] == 0) plan_.pieces_per_row *= sizes[d];
  }
  if (!sums_) plan_.pieces_per_row = plan_.pieces;
  return true;
}

// ---- Launch -------------------------------------------------------------------------------------

void Call::cut(const Step& step) {
  Plan& p = plan_;
  const Output* largest = nullptr;
  int64_t elements = 0;
  for (size_t k = 0; k < gradients_.size(); ++k) {
    if (!gradients_[k] || !gradients_[k]->reduced) continue;
    p.output[k].extent = product(gradients_[k]->operand.sizes);
    if (p.output[k].extent > elements) elements = (largest = &p.output[k])->extent;
  }
  bool whole_rows = false;
  if (largest && !step.value) {
    const Plan by_rows = rows_of(*largest, p);
    whole_rows = p.pieces / by_rows.pieces_per_row >= kEnoughRows &&
                 by_rows.pieces_per_row * p.inner >= kLongRow;
    if (whole_rows) p = by_rows;
  }
  p.segments = p.inner > kUnit ? ceil_div(p.inner, kUnit) : 1;
  p.segment_size = p.segments > 1 ? kUnit : p.inner;
  p.pieces_per_unit = std::clamp<int64_t>(kUnit / p.inner, 1, p.pieces_per_row);
  p.units_per_row = ceil_div(p.pieces_per_row, p.pieces_per_unit) * p.segments;
  p.units = p.pieces / p.pieces_per_row * p.units_per_row;
  if (!largest) return;
  if (!whole_rows) {  // each has a worthwhile share, and together they are a quarter of the whole
    p.slots =
        std::clamp<int64_t>(numel_ / std::max(kUnit, kGradientsPerSlot * elements), 1, kMaxSlots);
    return;
  }
  const int64_t rows = p.pieces / p.pieces_per_row;
  p.slots = std::clamp<int64_t>(numel_ / kUnit, 1, std::min(rows, kMaxSlots));
  p.slot_step = p.units_per_row;
  for (Output& output : p.output) {
    bool apart = true;  // in every dimension in which the largest is
    for (int d = 0; d < p.dims; ++d)
      apart &= largest->layout.stride[d] == 0 || output.layout.stride[d] != 0;
    if (apart) output.extent = 0;
  }
}

void Call::launch(int step_index, const Step& step) {
  finish_shape();
  if (numel_ == 0) return;
  const bool on_cuda = place_.device_type == aoti_torch_device_type_cuda();
  if (!on_cpu() && !(on_cuda ? kHasCuda : kCudaOnHost))
    fail("this build has no kernels for the device of " + std::string(inputs_[0].name));
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (on_cuda) guard.emplace(place_.device_index);
  while (!collapse(step)) {
  }
  if (on_cpu()) cut(step);
  Plan& p = plan_;
  for (size_t k = 0; k < inputs_.size(); ++k) {
    p.input[k].constant = inputs_[k].constant;
    if (inputs_[k].tensor) p.input[k].data = address(inputs_[k], dtype_);
  }
  if (grad_value_) p.row_grad.data = address(*grad_value_, accumulate_);
  if (weight_) p.weight.data = address(*weight_, accumulate_);
  if (seed_) p.noise.seed = static_cast<const int64_t*>(seed_->data_ptr());
  if (output_) p.output[0].write(Mode::full, address(*output_, dtype_));
  for (size_t k = 0; k < gradients_.size(); ++k)
    if (gradients_[k]) point(*gradients_[k], p.output[k]);
  if (step.value && !sums_) p.value.write(Mode::full, address(*value_, accumulate_));
  if (sums_) p.unit_sums = value_->tensor->mutable_data_ptr();
  if (!on_cpu()) {
    std::vector<Tensor> memory;
    run_on_cuda(op_, place_.device_index, step_index, step, dtype_, p, [&](int64_t bytes) {
      memory.push_back(allocate({ceil_div(bytes, 8)}, {1}, DType::float64));
      return memory.back().mutable_data_ptr();
    });
    return;
  }
  // Rows' sums go straight to the result, or each unit's to a partial sum.
  OptionalTensor partial;
  if (sums_ && p.units_per_row > 1) {
    partial = allocate({p.units}, {1}, accumulate_);
    p.unit_sums = partial->mutable_data_ptr();
  }
  run_on_cpu(step_index, dtype_, p);
  if (partial) {
    const int64_t parts = p.units_per_row, rows = p.units / parts;
    add_on_cpu(accumulate_, p.unit_sums, parts, parts, 1, accumulate_,
               value_->tensor->mutable_data_ptr(), rows);
  }
  for (size_t k = 0; k < gradients_.size(); ++k)
    if (gradients_[k] && gradients_[k]->reduced) finish(*gradients_[k], p.output[k]);
}

void Call::point(Gradient& gradient, Output& output) {
  if (!gradient.reduced) return output.write(Mode::full, address(gradient.operand, dtype_));
  if (!on_cpu()) return output.write(Mode::reduced, address(gradient.operand, dtype_));
  Dims sizes = gradient.operand.sizes, strides = dense_strides(sizes);
  const int64_t elements = product(sizes);
  sizes.prepend(1, output.extent ? plan_.slots : 1);
  strides.prepend(1, elements);
  Tensor slots = allocate(sizes, strides, DType::float64);
  gradient.slots = torch::stable::zero_(slots);
  output.write(Mode::reduced, slots.mutable_data_ptr());
}

void Call::finish(Gradient& gradient, const Output& output) {
  const bool half = accumulate_ != dtype_;
  const int64_t slices = gradient.slots->size(0), elements = product(gradient.operand.sizes);
  add_on_cpu(DType::float64, output.data, 1, slices, elements, half ? DType::float64 : dtype_,
             half ? output.data : gradient.result.mutable_data_ptr(), elements);
  if (half) torch::stable::copy_(gradient.result, torch::stable::select(*gradient.slots, 0, 0));
}

}  // namespace fastvae
