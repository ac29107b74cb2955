#include "log_sums.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "../cpu/dispatch.h"
#include "../cuda/dispatch.h"
#include "call.h"

namespace fastvae {
namespace {

constexpr int kGrad = kMaxOperands, kKept = kGrad + 1;  // their places behind the operands

// What calls of both loops do: read dense operands, allocate, choose the device.
class DenseCall {
 protected:
  DenseCall(const Declaration& op, const char* name, int64_t needs, const Tensor& first)
      : op_(op), name_(name), needs_(needs), place_(Place::of(first)) {
    const auto dtype = dtype_of(first);
    if (!dtype) fail("want float32, float64, bfloat16 or float16");
    dtype_ = *dtype;
    accumulate_ = dtype_ == DType::float64 ? DType::float64 : DType::float32;
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error("fastvae." + std::string(name_) + ": " + message);
  }

  // An operand's data, or that of a dense copy, which live as long as this.
  const void* read(int k, const Tensor& tensor, const Dims& sizes, bool right_dtype) {
    const std::string what = k == kKept ? op_.signature.keeps
                             : k == kGrad
                                 ? std::string("grad_") + (op_.z ? "z" : op_.signature.value)
                                 : op_.signature.operands[k];
    if (to_dims(tensor.sizes()) != sizes)
      fail(what + " has shape " + text(to_dims(tensor.sizes())) + ", want " + text(sizes));
    if (!right_dtype) fail(what + " has another dtype than this op wants");
    if (Place::of(tensor) != place_) fail(what + " is on another device than the others");
    read_[k] = torch::stable::contiguous(tensor);
    return read_[k]->data_ptr();
  }
  const void* read(int k, const Tensor& tensor, const Dims& sizes) {
    return read(k, tensor, sizes, dtype_of(tensor) == dtype_);
  }

  Tensor allocate(const Dims& sizes, DType dtype) const {
    return empty(sizes, contiguous_strides(sizes), dtype, place_);
  }

  // The gradients that are wanted, 0 if nothing will be written to them.
  Outputs gradients(bool nothing, const std::array<void**, kMaxOperands>& to) const {
    Outputs results(op_.operands);
    for (int k = 0; k < op_.operands; ++k) {
      if (!(needs_ >> k & 1) || !read_[k] || !to[k]) continue;
      results[k] = allocate(to_dims(read_[k]->sizes()), dtype_);
      *to[k] = results[k].mutable_data_ptr();
      if (nothing) torch::stable::zero_(results[k]);
    }
    return results;
  }

  // Calls one of these, with the device current.
  template <class OnCpu, class OnCuda>
  void launch(const OnCpu& on_cpu, const OnCuda& on_cuda) const {
    if (place_.on_cpu()) return on_cpu();
    const bool cuda = place_.device_type == aoti_torch_device_type_cuda();
    if (!(cuda ? kHasCuda : kCudaOnHost))
      fail("this build has no kernels for the device of the operands");
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (cuda) guard.emplace(place_.device_index);
    on_cuda();
  }

  const Declaration& op_;
  const char* name_;
  const int64_t needs_;
  const Place place_;
  DType dtype_, accumulate_;
  Dims values_;  // their shape
  std::array<OptionalTensor, kKept + 1> read_;
};

class PairCall : DenseCall {
 public:
  PairCall(const Declaration& op, const char* name, const Tensors& tensors, const Arguments& a)
      : DenseCall(op, name, a.needs, *tensors.operand[0]) {
    const auto& operand = tensors.operand;
    const Tensor &z = *operand[0], &mu = *operand[1];
    if (dtype_ != accumulate_) fail("z must be float32 or float64");
    if (z.dim() < 1 || mu.dim() != 2)
      fail("want z of shape [..., size] and mu of shape [components, size]");
    values_ = to_dims(z.sizes());
    pairs_.size = values_[values_.size() - 1];
    values_.resize(values_.size() - 1);
    pairs_.rows = product(values_);
    pairs_.components = mu.size(0);
    const Dims component{pairs_.components, pairs_.size};
    pairs_.z = read(0, z, to_dims(z.sizes()));
    pairs_.mu = read(1, mu, component);
    pairs_.s = read(2, *operand[2], component);
    if (op.signature.weighs && operand[3])
      pairs_.log_weights = read(3, *operand[3], {pairs_.components});
    pairs_.scale = scale_form(name, a.param);
    pairs_.log_own = a.log_own;
    pairs_.log_other = a.log_other;
    if (a.marginals) log_sums_.push_back(pairs_.size);
    log_sums_.append(values_.begin(), values_.end());
    if (op.signature.weighs)
      kind_ = a.marginals ? PairValue::marginals : PairValue::mixture;
    else
      values_.push_back(pairs_.components);
    if (tensors.kept) {
      const bool wide = dtype_of(*tensors.kept) == DType::float64;
      pairs_.log_sums =
          static_cast<double*>(const_cast<void*>(read(kKept, *tensors.kept, log_sums_, wide)));
    }
  }

  Outputs forward() {
    Outputs results{allocate(values_, dtype_)};
    pairs_.value = results[0].mutable_data_ptr();
    if (op_.signature.keeps) {
      results.push_back(allocate(log_sums_, DType::float64));
      pairs_.log_sums = static_cast<double*>(results[1].mutable_data_ptr());
    }
    if (product(values_) > 0) run();
    return results;
  }

  Outputs backward(const Tensor& grad) {
    pairs_.grad = read(kGrad, grad, values_);
    const bool nothing = product(values_) == 0;
    const Outputs results = gradients(
        nothing, {&pairs_.grad_z, &pairs_.grad_mu, &pairs_.grad_s, &pairs_.grad_log_weights});
    if (!nothing && needs_) run();
    return results;
  }

 private:
  void run() {
    std::vector<Tensor> memory;
    const Scratch scratch = [&](int64_t bytes) {
      memory.push_back(allocate({ceil_div(bytes, 8)}, DType::float64));
      return memory.back().mutable_data_ptr();
    };
    launch([&] { run_pairs_on_cpu(kind_, dtype_, pairs_, scratch); },
           [&] { run_pairs_on_cuda(name_, place_.device_index, kind_, dtype_, pairs_, scratch); });
  }

  PairValue kind_ = PairValue::each;
  Dims log_sums_;  // their shape
  Pairs pairs_;
};

class ItemCall : DenseCall {
 public:
  ItemCall(const Declaration& op, const char* name, const Tensors& tensors, const Arguments& a)
      : DenseCall(op, name, a.needs, *tensors.operand[1]) {
    const Tensor &x = *tensors.operand[0], &logits = *tensors.operand[1];
    if (logits.dim() < 1) fail("logits must be [..., items]");
    const Dims sizes = to_dims(logits.sizes());
    values_ = Dims(sizes.begin(), sizes.end() - 1);
    items_.items = sizes[sizes.size() - 1];
    items_.rows = product(values_);
    items_.logits = read(1, logits, sizes);
    if (x.scalar_type() == torch::headeronly::ScalarType::Long)
      items_.chosen = static_cast<const int64_t*>(read(0, x, values_, true));
    else
      items_.x = read(0, x, sizes);
  }

  Outputs forward() {
    Tensor value = allocate(values_, accumulate_);
    items_.value = value.mutable_data_ptr();
    if (items_.rows > 0) run();
    return {value};
  }

  Outputs backward(const Tensor& grad) {
    items_.grad = read(kGrad, grad, values_, dtype_of(grad) == accumulate_);
    void** const of_x = items_.x ? &items_.grad_x : nullptr;
    const Outputs results = gradients(items_.rows == 0, {of_x, &items_.grad_logits});
    if (items_.rows > 0 && needs_) run();
    return results;
  }

 private:
  // On a GPU, where looking would wait for it, an item that there is not gives NaN.
  void check_chosen() const {
    for (int64_t row = 0; items_.chosen && row < items_.rows; ++row)
      if (items_.chosen[row] < 0 || items_.chosen[row] >= items_.items)
        fail("x has an item " + std::to_string(items_.chosen[row]) + "; want 0 to " +
             std::to_string(items_.items - 1));
  }

  void run() const {
    if (place_.device_type == aoti_torch_device_type_cpu()) check_chosen();
    launch([&] { run_items_on_cpu(dtype_, items_); },
           [&] { run_items_on_cuda(name_, place_.device_index, dtype_, items_); });
  }

  Items items_;
};

class ColourCall : DenseCall {
 public:
  ColourCall(const Declaration& op, const char* name, const Tensors& tensors, const Arguments& a)
      : DenseCall(op, name, a.needs, *tensors.operand[1]) {
    const Tensor &x = *tensors.operand[0], &parameters = *tensors.operand[1];
    if (dtype_ != accumulate_) fail("parameters must be float32 or float64");
    if (parameters.dim() != 3 || x.dim() != 3)
      fail("want x of shape [rows, channels, pixels] and parameters [rows, planes, pixels]");
    colours_.rows = parameters.size(0);
    colours_.pixels = parameters.size(2);
    colours_.channels = int(x.size(1));
    colours_.components = int(a.components);
    if (colours_.channels != 1 && colours_.channels != 3)
      fail("x has " + std::to_string(colours_.channels) + " channels, want 1 or 3");
    if (a.components < 1 || a.components > 10000)
      fail("components is " + std::to_string(a.components) + ", want 1 to 10000");
    colours_.x = read(0, x, {colours_.rows, colours_.channels, colours_.pixels});
    colours_.parameters = read(1, parameters, {colours_.rows, colours_.planes(), colours_.pixels});
    if (tensors.operand[2])
      colours_.weight = read(2, *tensors.operand[2], {colours_.rows, colours_.pixels});
    colours_.settings.levels = levels_of(name, a.bins, a.low, a.high);
    colours_.least_log_scale = a.least_log_scale;
    values_ = {colours_.rows};
  }

  Outputs forward() {
    Tensor value = allocate(values_, dtype_);
    if (colours_.pixels == 0)
      torch::stable::zero_(value);
    else if (colours_.rows > 0)
      run(value.mutable_data_ptr());
    return {value};
  }

  // Data have no gradient, nor has what weighs them.
  Outputs backward(const Tensor& grad) {
    colours_.grad = read(kGrad, grad, values_);
    const bool nothing = colours_.rows * colours_.pixels == 0;
    const Outputs results = gradients(nothing, {nullptr, &colours_.grad_parameters});
    if (!nothing && colours_.grad_parameters) run(nullptr);
    return results;
  }

 private:
  void run(void* value) {
    OptionalTensor memory;
    const Scratch scratch = [&](int64_t bytes) {
      memory = allocate({ceil_div(bytes, 8)}, DType::float64);
      return memory->mutable_data_ptr();
    };
    launch(
        [&] { run_colours_on_cpu(dtype_, colours_, value, scratch); },
        [&] { run_colours_on_cuda(name_, place_.device_index, dtype_, colours_, value, scratch); });
  }

  Colours colours_;
};

class StraightThroughCall : DenseCall {
 public:
  StraightThroughCall(const Declaration& op, const char* name, const Tensors& tensors,
                      const Arguments& a)
      : DenseCall(op, name, a.needs, *tensors.operand[0]) {
    sizes_ = to_dims(tensors.operand[0]->sizes());
    if (sizes_.empty()) fail("logits must be [..., classes]");
    const int64_t dims = int64_t(sizes_.size());
    categoricals_.rows = dims > 1 ? sizes_[0] : 1;
    categoricals_.classes = sizes_[dims - 1];
    if (dims > 1) values_ = Dims(sizes_.begin() + 1, sizes_.end() - 1);
    categoricals_.groups = product(values_);
    categoricals_.uniform = a.uniform_mix;
    categoricals_.logits = read(0, *tensors.operand[0], sizes_);
    const Tensor& seed = *tensors.seed;
    if (seed.scalar_type() != torch::headeronly::ScalarType::Long || seed.dim() > 1 ||
        (seed.dim() == 1 && (dims < 2 || seed.size(0) != sizes_[0])))
      fail("seed must be int64 of shape [] or, one for each row, [" +
           std::to_string(categoricals_.rows) + "]");
    if (Place::of(seed) != place_) fail("seed is on another device than logits");
    seed_ = torch::stable::contiguous(seed);
    categoricals_.seed_per_row = seed.dim() == 1;
    categoricals_.seed = static_cast<const int64_t*>(seed_->data_ptr());
  }

  Outputs forward() {
    Tensor sample = allocate(sizes_, dtype_);
    categoricals_.sample = sample.mutable_data_ptr();
    if (product(sizes_) > 0) run();
    return {sample};
  }

  Outputs backward(const Tensor& grad) {
    categoricals_.grad_sample = read(kGrad, grad, sizes_);
    const Outputs results = gradients(false, {&categoricals_.grad_logits});
    if (product(sizes_) > 0 && categoricals_.grad_logits) run();
    return results;
  }

 private:
  void run() const {
    launch(
        [&] { run_straight_through_on_cpu(dtype_, categoricals_); },
        [&] { run_straight_through_on_cuda(name_, place_.device_index, dtype_, categoricals_); });
  }

  Categoricals categoricals_;
  Dims sizes_;
  OptionalTensor seed_;
};

class CategoricalKLCall : DenseCall {
 public:
  CategoricalKLCall(const Declaration& op, const char* name, const Tensors& tensors,
                    const Arguments& a)
      : DenseCall(op, name, a.needs, *tensors.operand[0]) {
    const Dims sizes = to_dims(tensors.operand[0]->sizes());
    const int64_t groups = int64_t(sizes.size()) - 1;  // dimensions
    if (groups < 0 || a.event_ndim < 0 || a.event_ndim > groups)
      fail("event_ndim is " + std::to_string(a.event_ndim) + ", want 0 to " +
           std::to_string(groups) + " for logits of [..., classes]");
    values_ = Dims(sizes.begin(), sizes.end() - 1 - a.event_ndim);
    categoricals_.classes = sizes[sizes.size() - 1];
    categoricals_.groups = product(Dims(sizes.end() - 1 - a.event_ndim, sizes.end() - 1));
    categoricals_.rows = product(values_);
    categoricals_.uniform = a.uniform_mix;
    categoricals_.free_nats = a.free_nats;
    categoricals_.balance = a.balance;
    categoricals_.logits = read(0, *tensors.operand[0], sizes);
    categoricals_.prior_logits = read(1, *tensors.operand[1], sizes);
  }

  Outputs forward() {
    Tensor value = allocate(values_, accumulate_);
    categoricals_.value = value.mutable_data_ptr();
    if (categoricals_.rows > 0) run();
    return {value};
  }

  Outputs backward(const Tensor& grad) {
    categoricals_.grad = read(kGrad, grad, values_, dtype_of(grad) == accumulate_);
    const bool nothing = categoricals_.rows * categoricals_.groups * categoricals_.classes == 0;
    const Outputs results =
        gradients(nothing, {&categoricals_.grad_logits, &categoricals_.grad_prior_logits});
    if (!nothing && needs_) run();
    return results;
  }

 private:
  void run() const {
    launch([&] { run_categorical_kl_on_cpu(dtype_, categoricals_); },
           [&] { run_categorical_kl_on_cuda(name_, place_.device_index, dtype_, categoricals_); });
  }

  Categoricals categoricals_;
};

template <class C>
Outputs run(C&& call, Direction direction, const Tensors& tensors) {
  if (direction == Direction::forward) return call.forward();
  return call.backward(tensors.grad_value ? *tensors.grad_value : *tensors.grad_z);
}

}  // namespace

Outputs run_log_sum(const Declaration& op, const char* name, Direction direction,
                    const Tensors& tensors, const Arguments& arguments) {
  if (op.signature.loop == Loop::pairs)
    return run(PairCall(op, name, tensors, arguments), direction, tensors);
  if (op.signature.loop == Loop::items)
    return run(ItemCall(op, name, tensors, arguments), direction, tensors);
  if (op.signature.loop == Loop::categoricals && op.signature.draws)
    return run(StraightThroughCall(op, name, tensors, arguments), direction, tensors);
  if (op.signature.loop == Loop::categoricals)
    return run(CategoricalKLCall(op, name, tensors, arguments), direction, tensors);
  return run(ColourCall(op, name, tensors, arguments), direction, tensors);
}

}  // namespace fastvae
