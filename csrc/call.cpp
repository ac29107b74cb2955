#include "call.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cuda/dispatch.h"

namespace fastvae {
namespace {

using torch::headeronly::ScalarType;

// Elements of a unit: enough to pay for handing it to a thread, few enough to share out a long row.
constexpr int64_t kUnit = 8192;
// Slices in which a broadcast operand's gradient is accumulated, each of at least `kUnit` elements: the
// parallelism of that case.
constexpr int64_t kMaxSlots = 64;

std::string text(const Dims& dims) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < dims.size(); ++i) out << (i ? ", " : "") << dims[i];
  out << ']';
  return out.str();
}

Dims to_dims(const torch::headeronly::IntHeaderOnlyArrayRef& a) { return {a.begin(), a.end()}; }

int64_t product(const Dims& dims) {
  int64_t n = 1;
  for (int64_t d : dims) n *= d;
  return n;
}

std::optional<DType> to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      return std::nullopt;
  }
}

ScalarType to_scalar_type(DType dtype) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                  ScalarType::Half};
  return types[int(dtype)];
}

int64_t size_of(DType dtype) {
  constexpr int64_t sizes[] = {4, 8, 2, 2};
  return sizes[int(dtype)];
}

int32_t device_type_of(const Tensor& tensor) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Dims contiguous_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  int64_t stride = 1;
  for (int d = int(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return strides;
}

}  // namespace

// ---- Operands -------------------------------------------------------------------------------------

Call::Call(const char* op, int64_t param) : op_(op) {
  constexpr ScaleForm forms[] = {{true, 0.5f}, {true, 1.0f}, {false, 1.0f}, {false, 0.5f}};
  if (param < 0 || param > 3) fail("param is " + std::to_string(param) + ", want 0 ... 3");
  plan_.scale = forms[param];
}

void Call::fail(const std::string& message) const {
  throw std::runtime_error("fastvae." + std::string(op_) + ": " + message);
}

Call::Operand Call::operand(const char* name, const Tensor& tensor) const {
  Operand result;
  result.name = name;
  result.tensor = tensor;
  result.sizes = to_dims(tensor.sizes());
  result.strides = to_dims(tensor.strides());
  return result;
}

void Call::check_type(const Operand& operand, DType dtype) const {
  if (to_dtype(operand.tensor->scalar_type()) != dtype)
    fail(operand.name + " has another dtype than this op wants for the given " + inputs_[0].name);
  if (device_type_of(*operand.tensor) != device_type_ ||
      operand.tensor->get_device_index() != device_index_)
    fail(operand.name + " is on another device than " + inputs_[0].name);
}

void Call::input(const char* name, const Tensor& tensor) {
  inputs_.push_back(operand(name, tensor));
  if (inputs_.size() == 1) {
    const auto dtype = to_dtype(tensor.scalar_type());
    if (!dtype) fail(std::string(name) + " must be float32, float64, bfloat16 or float16");
    dtype_ = *dtype;
    accumulate_ = dtype_ == DType::float64 ? DType::float64 : DType::float32;
    device_type_ = device_type_of(tensor);
    device_index_ = tensor.get_device_index();
  }
  check_type(inputs_.back(), dtype_);
}

void Call::constant(double value) {
  inputs_.emplace_back();
  inputs_.back().constant = value;
}

void Call::gaussian(const char* mu_name, const Tensor& mu, const char* s_name,
                    const OptionalTensor& s, int64_t packed_dim) {
  input(mu_name, mu);
  if (s) return input(s_name, *s);
  Operand& first = inputs_.back();
  if (packed_dim < 0 || packed_dim >= int64_t(first.sizes.size()))
    fail("packed_dim is " + std::to_string(packed_dim) + " for a tensor of shape " +
         text(first.sizes));
  if (first.sizes[packed_dim] % 2 != 0)
    fail(first.name + " of shape " + text(first.sizes) + " has no two halves along dimension " +
         std::to_string(packed_dim));
  first.packed_dim = int(packed_dim);
  first.sizes[packed_dim] /= 2;
  Operand second = first;
  second.name = s_name;
  second.offset = first.sizes[packed_dim] * first.strides[packed_dim];
  inputs_.push_back(second);
}

void Call::noise(const Tensor& seed, const Dims& sample_shape) {
  seed_ = seed;
  sample_shape_ = sample_shape;
}

void Call::rows(int64_t event_ndim) { event_ndim_ = event_ndim; }

void Call::grad_output(const Tensor& grad) { grad_output_ = operand("grad_z", grad); }
void Call::grad_value(const Tensor& grad) { grad_value_ = operand("grad_output", grad); }

// ---- The common shape and its order in memory ------------------------------------------------------

// Strides along the common shape of a tensor that broadcasts to it.
Dims Call::spread(const Operand& operand, const Dims& strides) const {
  Dims result(shape_.size(), 0);
  const size_t skip = shape_.size() - operand.trailing - operand.sizes.size();
  for (size_t d = 0; d < operand.sizes.size(); ++d)
    if (operand.sizes[d] != 1) result[skip + d] = strides[d];
  return result;
}

void Call::finish_shape() {
  if (!order_.empty() || !shape_.empty()) return;
  Dims base;
  for (const Operand& input : inputs_) {
    if (input.sizes.size() > base.size()) base.insert(base.begin(), input.sizes.size() - base.size(), 1);
    const size_t skip = base.size() - input.sizes.size();
    for (size_t d = 0; d < input.sizes.size(); ++d) {
      if (base[skip + d] == 1) base[skip + d] = input.sizes[d];
      if (input.sizes[d] != 1 && input.sizes[d] != base[skip + d])
        fail(input.name + " of shape " + text(input.sizes) + " does not broadcast to " + text(base));
    }
  }
  shape_ = sample_shape_;
  shape_.insert(shape_.end(), base.begin(), base.end());
  numel_ = product(shape_);
  if (event_ndim_ > int64_t(base.size()) || event_ndim_ < -1)
    fail("event_ndim is " + std::to_string(event_ndim_) + " for the shape " + text(base));
  const int64_t sample_ndim = int64_t(sample_shape_.size());
  const int64_t first = sample_ndim + std::min<int64_t>(1, int64_t(base.size()));
  lead_ = int(event_ndim_ > 0 ? int64_t(shape_.size()) - event_ndim_ : first);

  for (Operand& input : inputs_) {
    if (input.packed_dim >= 0 && input.sizes != shape_)
      fail(input.name + " is packed and must not be broadcast from " + text(input.sizes) + " to " +
           text(shape_));
    input.strides = spread(input, input.strides);
  }
  if (grad_output_) {
    check_type(*grad_output_, dtype_);
    if (grad_output_->sizes != shape_)
      fail("grad_z has shape " + text(grad_output_->sizes) + ", want " + text(shape_));
    inputs_.push_back(*grad_output_);
  }
  if (grad_value_) {
    check_type(*grad_value_, accumulate_);
    const Dims want(shape_.begin(), shape_.end() - event_ndim_);
    if (grad_value_->sizes != want)
      fail("grad_output has shape " + text(grad_value_->sizes) + ", want " + text(want));
    grad_value_->trailing = std::max<int64_t>(event_ndim_, 0);
    grad_value_->strides = spread(*grad_value_, grad_value_->strides);
  }
  if (seed_) {
    if (seed_->scalar_type() != ScalarType::Long || seed_->dim() > 1 ||
        (seed_->dim() == 1 && (base.empty() || seed_->size(0) != base[0])))
      fail("seed must be int64 of shape [] or, one for each row, [" +
           (base.empty() ? "" : std::to_string(base[0])) + "]");
    if (device_type_of(*seed_) != device_type_ || seed_->get_device_index() != device_index_)
      fail("seed is on another device than " + inputs_[0].name);
    seed_ = torch::stable::contiguous(*seed_);
    plan_.noise.seed_per_row = seed_->dim() == 1;
  }
  finish_order();
}

// Outputs take the memory order of the first input, as eager operations do (channels_last), as long
// as rows stay outside of what is summed.
void Call::finish_order() {
  order_.resize(shape_.size());
  for (size_t d = 0; d < order_.size(); ++d) order_[d] = int(d);
  const Dims& strides = inputs_[0].strides;
  for (size_t d = lead_; d < shape_.size(); ++d)
    if (shape_[d] > 1 && strides[d] == 0) return;
  // Dimensions of size 1 have no place of their own; they go where they disturb nothing.
  const auto key = [&](int d) { return shape_[d] == 1 ? INT64_MAX : strides[d]; };
  std::stable_sort(order_.begin() + lead_, order_.end(), [&](int a, int b) { return key(a) > key(b); });
}

// Of a dense tensor in the common order, whose sizes broadcast to the common shape.
Dims Call::dense_strides(const Dims& sizes, int64_t trailing) const {
  Dims strides(sizes.size());
  const int skip = int(shape_.size() - trailing - sizes.size());
  int64_t stride = 1;
  for (int i = int(order_.size()) - 1; i >= 0; --i) {
    const int d = order_[i] - skip;
    if (d < 0 || d >= int(sizes.size())) continue;
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

Tensor Call::allocate(const Dims& sizes, const Dims& strides, DType dtype) const {
  AtenTensorHandle handle = nullptr;
  const ScalarType type = to_scalar_type(dtype);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type_,
      device_index_, &handle));
  return Tensor(handle);
}

void Call::make_dense(Operand& operand) const {
  const Dims strides = dense_strides(operand.sizes, operand.trailing);
  Tensor source = *operand.tensor;
  if (operand.packed_dim >= 0) {
    int64_t dim = operand.packed_dim, length = operand.sizes[dim];
    source = torch::stable::narrow(source, dim, operand.offset == 0 ? 0 : length, length);
  }
  Tensor dense = allocate(operand.sizes, strides, *to_dtype(source.scalar_type()));
  torch::stable::copy_(dense, source);
  operand.tensor = dense;
  operand.offset = 0;
  operand.packed_dim = -1;
  operand.strides = spread(operand, strides);
}

// ---- Outputs ---------------------------------------------------------------------------------------

Tensor Call::output() {
  finish_shape();
  Tensor z = allocate(shape_, dense_strides(shape_), dtype_);
  output_ = operand("z", z);
  return z;
}

Tensor Call::value() {
  finish_shape();
  const Dims sizes(shape_.begin(), shape_.end() - event_ndim_);
  Tensor value = allocate(sizes, event_ndim_ == 0 ? dense_strides(sizes) : contiguous_strides(sizes),
                          accumulate_);
  if (numel_ == 0) torch::stable::zero_(value);
  value_ = operand("value", value);
  value_->trailing = event_ndim_;
  value_->strides = spread(*value_, value_->strides);
  return value;
}

std::vector<Tensor> Call::gradients(int count, int64_t needs) {
  finish_shape();
  std::vector<Tensor> results(count);
  gradients_.resize(count);
  for (int k = 0; k < count; ++k) {
    const Operand& input = inputs_[k];
    if (!(needs >> k & 1) || !input.tensor) continue;
    if (input.packed_dim >= 0) {
      Dims sizes = input.sizes;
      sizes[input.packed_dim] *= 2;
      const Dims strides = dense_strides(sizes);
      results[k] = allocate(sizes, strides, dtype_);
      for (int half = 0; half < 2; ++half) {
        Gradient gradient{input, results[k]};
        gradient.operand.tensor = results[k];
        gradient.operand.strides = strides;
        gradient.operand.offset = half * input.sizes[input.packed_dim] * strides[input.packed_dim];
        gradients_[k + half] = gradient;
      }
      ++k;
      continue;
    }
    const Dims strides = dense_strides(input.sizes);
    results[k] = allocate(input.sizes, strides, dtype_);
    Gradient gradient{input, results[k]};
    gradient.operand.tensor = results[k];
    gradient.operand.strides = spread(input, strides);
    gradient.operand.offset = 0;
    const int64_t extent = product(input.sizes);
    gradient.reduced = extent != numel_;
    if (gradient.reduced && numel_ == 0) torch::stable::zero_(results[k]);
    if (gradient.reduced && !on_cpu()) gradient.operand.strides = dense_strides(shape_);
    if (gradient.reduced && on_cpu()) {
      // Each slot has a worthwhile share, and together they are no more than the whole.
      const int64_t slots = std::clamp<int64_t>(numel_ / std::max(kUnit, extent), 1, kMaxSlots);
      plan_.slots = plan_.slots ? std::min(plan_.slots, slots) : slots;
    }
    gradients_[k] = gradient;
  }
  return results;
}

// ---- Collapse --------------------------------------------------------------------------------------

void* Call::address(const Operand& operand, DType dtype) const {
  return static_cast<char*>(operand.tensor->data_ptr()) + operand.offset * size_of(dtype);
}

// Fills the plan's dimensions and layouts. Operands whose innermost stride is neither 0 nor 1 are
// replaced by dense copies; then the answer is false, and the collapse must be made again.
bool Call::collapse(const Step& step) {
  struct Column {
    Dims strides;
    Layout* layout;
    Operand* operand;  // none: not in memory
  };
  std::vector<Column> columns;
  const size_t rank = shape_.size();
  for (size_t k = 0; k < inputs_.size(); ++k)
    if (inputs_[k].tensor)
      columns.push_back({inputs_[k].strides, &plan_.input[k].layout, &inputs_[k]});
  if (output_) columns.push_back({output_->strides, &plan_.output[0].layout, &*output_});
  for (size_t k = 0; k < gradients_.size(); ++k)
    if (gradients_[k])
      columns.push_back({gradients_[k]->operand.strides, &plan_.output[k].layout,
                         &gradients_[k]->operand});
  if (grad_value_) columns.push_back({grad_value_->strides, &plan_.row_grad.layout, &*grad_value_});

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
  std::vector<int64_t> sizes;
  std::vector<Dims> strides;  // of each collapsed dimension, one a column
  for (int d : order_) {
    if (shape_[d] == 1) continue;
    Dims here;
    for (const Column& column : columns) here.push_back(column.strides[d]);
    bool merge = !sizes.empty();
    for (size_t c = 0; merge && c < columns.size(); ++c)
      merge = strides.back()[c] == here[c] * shape_[d];
    if (merge) {
      sizes.back() *= shape_[d];
      strides.back() = here;
    } else {
      sizes.push_back(shape_[d]);
      strides.push_back(here);
    }
  }
  if (sizes.empty()) {
    sizes.push_back(1);
    strides.emplace_back(columns.size(), 0);
  }
  const bool too_many = sizes.size() > kMaxDims + 1;
  bool done = true;
  for (size_t c = 0; c < columns.size(); ++c) {
    Operand* operand = columns[c].operand;
    if (!operand || (!too_many && (strides.back()[c] == 0 || strides.back()[c] == 1))) continue;
    if (operand->strides == spread(*operand, dense_strides(operand->sizes, operand->trailing))) continue;
    make_dense(*operand);
    done = false;
  }
  if (!done) return false;
  if (too_many) fail("the operands broadcast along too many alternating dimensions");

  plan_.dims = int(sizes.size()) - 1;
  plan_.inner = sizes.back();
  plan_.pieces = plan_.pieces_per_row = 1;
  for (size_t c = 0; c < columns.size(); ++c) {
    for (int d = 0; d < plan_.dims; ++d) columns[c].layout->stride[d] = strides[d][c];
    columns[c].layout->inner = strides.back()[c];
  }
  for (int d = 0; d < plan_.dims; ++d) {
    plan_.size[d] = sizes[d];
    plan_.pieces *= sizes[d];
    if (sums_ && rows.stride[d] == 0) plan_.pieces_per_row *= sizes[d];
  }
  if (!sums_) plan_.pieces_per_row = plan_.pieces;
  return true;
}

// ---- Launch ----------------------------------------------------------------------------------------

void Call::cut() {
  Plan& p = plan_;
  p.segments = p.inner > kUnit ? ceil_div(p.inner, kUnit) : 1;
  p.segment_size = p.segments > 1 ? kUnit : p.inner;
  p.pieces_per_unit = std::clamp<int64_t>(kUnit / p.inner, 1, p.pieces_per_row);
  p.units_per_row = ceil_div(p.pieces_per_row, p.pieces_per_unit) * p.segments;
  p.units = p.pieces / p.pieces_per_row * p.units_per_row;
}

bool Call::on_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }

void Call::launch(int step_index, const Step& step) {
  finish_shape();
  if (numel_ == 0) return;
  if (!on_cpu() && (device_type_ != aoti_torch_device_type_cuda() || !kHasCuda))
    fail("this build has no kernels for the device of " + inputs_[0].name);
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (!on_cpu()) guard.emplace(device_index_);
  while (!collapse(step)) {
  }
  cut();
  Plan& p = plan_;
  for (size_t k = 0; k < inputs_.size(); ++k) {
    p.input[k].constant = inputs_[k].constant;
    if (inputs_[k].tensor) p.input[k].data = address(inputs_[k], dtype_);
  }
  if (grad_value_) p.row_grad.data = address(*grad_value_, accumulate_);
  if (seed_) p.noise.seed = static_cast<const int64_t*>(seed_->data_ptr());
  if (output_) p.output[0].write(Mode::full, address(*output_, dtype_));
  for (size_t k = 0; k < gradients_.size(); ++k)
    if (gradients_[k]) point(*gradients_[k], p.output[k]);
  // Rows' sums go straight to the result, or each unit's to a partial sum.
  OptionalTensor partial;
  if (step.value && !sums_) p.value.write(Mode::full, address(*value_, accumulate_));
  if (sums_) {
    if (p.units_per_row > 1) partial = allocate({p.units}, {1}, accumulate_);
    p.unit_sums = (partial ? *partial : *value_->tensor).mutable_data_ptr();
  }

  if (on_cpu())
    run_on_cpu(step_index, dtype_, p);
  else
    run_on_cuda(op_, device_index_, step_index, dtype_, p);

  if (partial) {
    void* sums = value_->tensor->mutable_data_ptr();
    const int64_t parts = p.units_per_row, rows = p.units / parts;
    if (on_cpu())
      add_on_cpu(accumulate_, p.unit_sums, parts, parts, 1, sums, rows);
    else
      add_on_cuda(op_, device_index_, accumulate_, p.unit_sums, parts, parts, 1, sums, rows);
  }
  for (size_t k = 0; k < gradients_.size(); ++k)
    if (gradients_[k] && gradients_[k]->reduced) finish(*gradients_[k], p.output[k]);
}

void Call::point(Gradient& gradient, Output& output) {
  if (!gradient.reduced) return output.write(Mode::full, address(gradient.operand, dtype_));
  if (!on_cpu()) {
    gradient.terms = allocate(shape_, dense_strides(shape_), dtype_);
    return output.write(Mode::full, gradient.terms->mutable_data_ptr());
  }
  output.extent = product(gradient.operand.sizes);
  Dims sizes = gradient.operand.sizes, strides = dense_strides(sizes);
  sizes.insert(sizes.begin(), plan_.slots);
  strides.insert(strides.begin(), output.extent);
  Tensor slots = allocate(sizes, strides, accumulate_);
  gradient.terms = torch::stable::zero_(slots);
  output.write(Mode::reduced, slots.mutable_data_ptr());
}

void Call::finish(Gradient& gradient, const Output& output) {
  Tensor terms = *gradient.terms;
  const Dims& sizes = gradient.operand.sizes;
  if (on_cpu()) {
    const bool convert = accumulate_ != dtype_;
    add_on_cpu(accumulate_, output.data, 1, plan_.slots, output.extent,
               convert ? output.data : gradient.result.mutable_data_ptr(), output.extent);
    if (convert) torch::stable::copy_(gradient.result, torch::stable::select(terms, 0, 0));
    return;
  }
  Dims broadcast;
  const size_t skip = shape_.size() - sizes.size();
  for (size_t d = 0; d < shape_.size(); ++d)
    if (shape_[d] != 1 && (d < skip || sizes[d - skip] == 1)) broadcast.push_back(int64_t(d));
  torch::stable::copy_(gradient.result,
                       torch::stable::reshape(torch::stable::sum(terms, broadcast), sizes));
}

}  // namespace fastvae
