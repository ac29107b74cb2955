#include "call.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "../cpu/dispatch.h"
#include "../cuda/dispatch.h"

namespace fastvae {
namespace {

using torch::headeronly::ScalarType;

ScalarType to_scalar_type(DType dtype) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                  ScalarType::Half};
  return types[int(dtype)];
}

[[noreturn]] void fail_in(const char* op, const std::string& message) {
  throw std::runtime_error("fastvae." + std::string(op) + ": " + message);
}

}  // namespace

std::optional<DType> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
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

Place Place::of(const Tensor& tensor) {
  Place place;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.device_type));
  place.device_index = tensor.get_device_index();
  return place;
}

bool Place::on_cpu() const { return device_type == aoti_torch_device_type_cpu() && !kCudaOnHost; }

Tensor empty(const Dims& sizes, const Dims& strides, DType dtype, Place place) {
  AtenTensorHandle handle = nullptr;
  const ScalarType type = to_scalar_type(dtype);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), place.device_type,
      place.device_index, &handle));
  Tensor tensor(handle);
  if (place.on_cpu())
    use_large_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

Levels levels_of(const char* name, int64_t bins, double low, double high) {
  if (bins < 2) fail_in(name, "bins is " + std::to_string(bins) + ", want at least 2");
  const double width = (high - low) / double(bins - 1);
  return {width / 2, std::log(width), low + width / 2, high - width / 2};
}

ScaleForm scale_form(const char* name, int64_t param) {
  constexpr ScaleForm forms[] = {{true, 0.5f}, {true, 1.0f}, {false, 1.0f}, {false, 0.5f}};
  if (param < 0 || param > 3) fail_in(name, "param is " + std::to_string(param) + ", want 0 ... 3");
  return forms[param];
}

// ---- Operands -----------------------------------------------------------------------------------

Call::Call(const char* op, int64_t param, const OptionalBound& bound) : op_(op) {
  plan_.settings.scale = scale_form(op, param);
  if (!bound) return;
  constexpr int kRaised = int(Bounding::raised), kForms = int(Raised::softplus) + 1;
  ScaleForm& scale = plan_.settings.scale;
  if (bound->size() != 3 || !((*bound)[0] >= 0 && (*bound)[0] < kRaised + kForms))
    fail("bound is not a kind, 0 ... 8, with its two ends");
  const int kind = int((*bound)[0]);
  scale.bounding = Bounding(std::min(kind, kRaised));
  scale.low = (*bound)[1];
  scale.high = (*bound)[2];
  if (kind < kRaised) return;
  if (param != 1) fail("what is raised is read as ln sigma; want param 1");
  scale.raised = Raised(kind - kRaised);
  scale.high = std::log(scale.low);
}

void Call::fail(const std::string& message) const { fail_in(op_, message); }

Call::Operand Call::operand(const char* name, const Tensor& tensor) const {
  Operand result;
  result.name = name;
  result.tensor = tensor;
  result.sizes = to_dims(tensor.sizes());
  result.strides = to_dims(tensor.strides());
  return result;
}

void Call::check_type(const Operand& operand, DType dtype) const {
  if (dtype_of(*operand.tensor) != dtype)
    fail(std::string(operand.name) + " has another dtype than this op wants for the given " +
         inputs_[0].name);
  if (Place::of(*operand.tensor) != place_)
    fail(std::string(operand.name) + " is on another device than " + inputs_[0].name);
}

void Call::input(const char* name, const Tensor& tensor) {
  inputs_.push_back(operand(name, tensor));
  if (inputs_.size() == 1) {
    const auto dtype = dtype_of(tensor);
    if (!dtype) fail(std::string(name) + " must be float32, float64, bfloat16 or float16");
    dtype_ = *dtype;
    accumulate_ = dtype_ == DType::float64 ? DType::float64 : DType::float32;
    place_ = Place::of(tensor);
  }
  check_type(inputs_.back(), dtype_);
}

void Call::constant(double value) {
  Operand number;
  number.constant = value;
  inputs_.push_back(number);
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
    fail(std::string(first.name) + " of shape " + text(first.sizes) +
         " has no two halves along dimension " + std::to_string(packed_dim));
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

void Call::levels(int64_t bins, double low, double high) {
  plan_.settings.levels = levels_of(op_, bins, low, high);
}

void Call::counts(int64_t param, bool data_gradient) {
  if (param != 0 && param != 1) fail("param is " + std::to_string(param) + ", want 0 or 1");
  plan_.settings.counts = {param == 1, data_gradient};
}

void Call::rows(int64_t event_ndim, const OptionalTensor& weight) {
  if (event_ndim < 0) fail("event_ndim is " + std::to_string(event_ndim) + ", want at least 0");
  event_ndim_ = event_ndim;
  if (weight) weight_ = operand("weight", *weight);
}

void Call::grad_output(const OptionalTensor& grad) {
  grad_output_ = grad ? operand("grad_z", *grad) : Operand{.name = "grad_z"};
}

void Call::grad_value(const OptionalTensor& grad, double number) {
  if (grad)
    grad_value_ = operand("grad_output", *grad);
  else
    plan_.row_grad.constant = number;
}

// ---- The common shape and its order in memory ---------------------------------------------------

// Strides along the common shape of a tensor that broadcasts to it.
Dims Call::spread(const Operand& operand, const Dims& strides) const {
  Dims result(shape_.size(), 0);
  const size_t skip = shape_.size() - operand.trailing - operand.sizes.size();
  for (size_t d = 0; d < operand.sizes.size(); ++d)
    if (operand.sizes[d] != 1) result[skip + d] = strides[d];
  return result;
}

void Call::finish_shape() {
  if (std::exchange(has_shape_, true)) return;
  Dims base;
  for (const Operand& input : inputs_) {
    if (input.sizes.size() > base.size()) base.prepend(input.sizes.size() - base.size(), 1);
    const size_t skip = base.size() - input.sizes.size();
    for (size_t d = 0; d < input.sizes.size(); ++d) {
      if (base[skip + d] == 1) base[skip + d] = input.sizes[d];
      if (input.sizes[d] != 1 && input.sizes[d] != base[skip + d])
        fail(std::string(input.name) + " of shape " + text(input.sizes) +
             " does not broadcast to " + text(base));
    }
  }
  shape_ = sample_shape_;
  shape_.append(base.begin(), base.end());
  numel_ = product(shape_);
  if (event_ndim_ > int64_t(base.size()) || event_ndim_ < -1)
    fail("event_ndim is " + std::to_string(event_ndim_) + " for the shape " + text(base));
  const int64_t sample_ndim = int64_t(sample_shape_.size());
  const int64_t first = sample_ndim + std::min<int64_t>(1, int64_t(base.size()));
  lead_ = int(event_ndim_ > 0 ? int64_t(shape_.size()) - event_ndim_ : first);

  for (Operand& input : inputs_) {
    if (input.packed_dim >= 0 && input.sizes != shape_)
      fail(std::string(input.name) + " is packed and must not be broadcast from " +
           text(input.sizes) + " to " + text(shape_));
    input.strides = spread(input, input.strides);
  }
  if (weight_) {
    check_type(*weight_, accumulate_);
    const Dims& sizes = weight_->sizes;
    bool broadcasts = sizes.size() <= base.size();
    for (size_t d = 0; broadcasts && d < sizes.size(); ++d)
      broadcasts = sizes[d] == 1 || sizes[d] == base[base.size() - sizes.size() + d];
    if (!broadcasts)
      fail("weight of shape " + text(sizes) + " does not broadcast to " + text(base));
    weight_->strides = spread(*weight_, weight_->strides);
  }
  if (grad_output_) {
    if (!grad_output_->tensor) {
      Tensor zeros = allocate(shape_, contiguous_strides(shape_), dtype_);
      grad_output_ = operand("grad_z", torch::stable::zero_(zeros));
    }
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
    if (Place::of(*seed_) != place_)
      fail("seed is on another device than " + std::string(inputs_[0].name));
    plan_.noise.seed_per_row = seed_->dim() == 1;
    if (plan_.noise.seed_per_row) seed_ = torch::stable::contiguous(*seed_);
  }
  finish_order();
}

// Outputs take the memory order of the first input, as eager operations do (channels_last), as long
// as rows stay outside of what is summed.
void Call::finish_order() {
  order_.resize(shape_.size());
  for (size_t d = 0; d < order_.size(); ++d) order_[d] = int64_t(d);
  const Dims& strides = inputs_[0].strides;
  for (size_t d = lead_; d < shape_.size(); ++d)
    if (shape_[d] > 1 && strides[d] == 0) return;
  // Dimensions of size 1 have no place of their own and go where they disturb nothing, but for that
  // of packed halves, which is 2 in the gradient.
  const auto key = [&](int64_t d) {
    if (d == inputs_[0].packed_dim) return inputs_[0].tensor->stride(d);
    return shape_[d] == 1 ? INT64_MAX : strides[d];
  };
  const auto outer = [&](int64_t a, int64_t b) { return key(a) > key(b); };
  if (!std::is_sorted(order_.begin() + lead_, order_.end(), outer))  // sorting allocates
    std::stable_sort(order_.begin() + lead_, order_.end(), outer);
}

// Of a dense tensor in the common order, whose sizes broadcast to the common shape.
Dims Call::dense_strides(const Dims& sizes, int64_t trailing) const {
  Dims strides(sizes.size());
  const int skip = int(shape_.size() - trailing - sizes.size());
  int64_t stride = 1;
  for (int i = int(order_.size()) - 1; i >= 0; --i) {
    const int d = int(order_[i]) - skip;
    if (d < 0 || d >= int(sizes.size())) continue;
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

Tensor Call::allocate(const Dims& sizes, const Dims& strides, DType dtype) const {
  return empty(sizes, strides, dtype, place_);
}

void Call::make_dense(Operand& operand) const {
  const Dims strides = dense_strides(operand.sizes, operand.trailing);
  Tensor source = *operand.tensor;
  if (operand.packed_dim >= 0) {
    int64_t dim = operand.packed_dim, length = operand.sizes[dim];
    source = torch::stable::narrow(source, dim, operand.offset == 0 ? 0 : length, length);
  }
  Tensor dense = allocate(operand.sizes, strides, *dtype_of(source));
  torch::stable::copy_(dense, source);
  operand.tensor = dense;
  operand.offset = 0;
  operand.packed_dim = -1;
  operand.strides = spread(operand, strides);
}

// ---- Outputs ------------------------------------------------------------------------------------

Tensor Call::output() {
  finish_shape();
  Tensor z = allocate(shape_, dense_strides(shape_), dtype_);
  output_ = operand("z", z);
  return z;
}

Tensor Call::value() {
  finish_shape();
  const Dims sizes(shape_.begin(), shape_.end() - event_ndim_);
  Tensor value = allocate(
      sizes, event_ndim_ == 0 ? dense_strides(sizes) : contiguous_strides(sizes), accumulate_);
  if (numel_ == 0) torch::stable::zero_(value);
  value_ = operand("value", value);
  value_->trailing = event_ndim_;
  value_->strides = spread(*value_, value_->strides);
  return value;
}

Gradients Call::gradients(int count, int64_t needs) {
  finish_shape();
  Gradients results(count);
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
    gradient.reduced = product(input.sizes) != numel_;
    if (gradient.reduced && numel_ == 0) torch::stable::zero_(results[k]);
    gradients_[k] = gradient;
  }
  return results;
}

bool Call::sums_gradients_on_gpu() const {
  return !on_cpu() && std::ranges::any_of(gradients_, [](const auto& gradient) {
    return gradient && gradient->reduced;
  });
}

// ---- In place -----------------------------------------------------------------------------------

void Call::scale(const Tensor& factor) {
  const Operand& gradient = inputs_[0];
  const Operand by = operand("factor", factor);
  const bool wide = factor.scalar_type() == ScalarType::Double;
  const DType type = wide ? DType::float64 : DType::float32;
  check_type(by, type);
  if (!by.sizes.empty()) fail("factor has shape " + text(by.sizes) + ", want []");
  if (on_cpu()) fail("on the CPU there is no kernel, and no need of one");
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (!kCudaOnHost) guard.emplace(place_.device_index);
  scale_on_cuda(op_, place_.device_index, dtype_, gradient.tensor->mutable_data_ptr(),
                gradient.tensor->numel(), type, factor.data_ptr());
}

}  // namespace fastvae
