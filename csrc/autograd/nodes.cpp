#include "nodes.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

namespace fastvae {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;

const Api* the_ops = nullptr;
ByDefinition by_definition = nullptr;

// ---- Plain tensors ------------------------------------------------------------------------------

bool is_dense(const at::Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet allowed(
      {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
       DispatchKey::AutogradCUDA, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  return !tensor.defined() || ((tensor.key_set().raw_repr() & ~allowed.raw_repr()) == 0 &&
                               !tensor._fw_grad(0).defined());
}

// Whether no mode waits in the dispatcher.
bool is_alone() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included.raw_repr() & ~c10::default_included_set.raw_repr()) == 0;
}

// ---- The kernels --------------------------------------------------------------------------------

AtenTensorHandle handle_of(const at::Tensor& tensor) {
  return tensor.defined() ? reinterpret_cast<AtenTensorHandle>(new at::Tensor(tensor)) : nullptr;
}

TensorList run(const Request& request, Direction direction, const at::Tensor& grad_z = {},
               const at::Tensor& grad_value = {}) {
  at::RecordFunction record(at::RecordScope::FUNCTION);  // the profiler sees what it is used to
  if (record.isActive())
    record.before(std::string("fastvae::") + ops().name(request.op, direction));
  Handles handles;
  for (int k = 0; k < kMaxOperands; ++k) handles.operand[k] = handle_of(request.operand[k]);
  handles.kept = handle_of(request.kept);
  handles.seed = handle_of(request.seed);
  handles.weight = handle_of(request.weight);
  handles.grad_z = handle_of(grad_z);
  handles.grad_value = handle_of(grad_value);
  TensorList results;
  results.reserve(kMaxOperands + 1);
  for (AtenTensorHandle handle : ops().run(request.op, direction, handles, request.arguments)) {
    auto* tensor = reinterpret_cast<at::Tensor*>(handle);
    results.push_back(tensor ? std::move(*tensor) : at::Tensor());
    delete tensor;
  }
  return results;
}

// As `torch.empty((), dtype=torch.int64).random_()` draws it, which on the CPU takes one number of
// 64 bits from PyTorch's own generator (at::transformation::uniform_int), in a tenth of the time.
at::Tensor draw_seed(const at::Tensor& like) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(like.device());
  if (!like.is_cpu()) return at::empty({}, options).random_();
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  const uint64_t word = generator.get<at::CPUGeneratorImpl>()->random64();
  at::Tensor seed(at::detail::empty_cpu({}, options));
  *seed.mutable_data_ptr<int64_t>() = int64_t(word & INT64_MAX);
  return seed;
}

// tensor *= factor, a 0-d tensor or a number. Never waits for a device, nor touches the tensor if
// the factor is 1.
void multiply_(const at::Tensor& tensor, const at::Tensor& factor) {
  if (tensor.is_cpu()) {
    const double number = factor.scalar_type() == at::kDouble ? *factor.const_data_ptr<double>()
                                                              : *factor.const_data_ptr<float>();
    if (number != 1) tensor.mul_(number);
    return;
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastvae::scale_", "");
  std::vector<c10::IValue> stack = {tensor, factor};
  op.callBoxed(stack);
}

void multiply_scalar_(const at::Tensor& scalar, double factor) {
  if (!scalar.is_cpu())
    scalar.mul_(factor);
  else if (scalar.scalar_type() == at::kDouble)
    *scalar.mutable_data_ptr<double>() *= factor;
  else
    *scalar.mutable_data_ptr<float>() *= float(factor);
}

// ---- Nodes --------------------------------------------------------------------------------------

// Saves the operands, the seed and what an op keeps, nothing else; noise is drawn again in
// backward.
struct OpNode : Node {
  // As PyTorch's own are named: RsampleKlBackward.
  std::string name() const override {
    std::string result;
    for (const char* c = declaration().signature.name; *c; ++c)
      if (*c != '_') result += result.empty() || c[-1] == '_' ? char(std::toupper(*c)) : *c;
    return result + "Backward";
  }

  void save(const Request& request) {
    op_ = request.op;
    arguments_ = request.arguments;
    for (int k = 0; k < kMaxOperands; ++k)
      if (request.operand[k].defined()) operand_[k] = SavedVariable(request.operand[k], false);
    if (request.kept.defined()) kept_ = SavedVariable(request.kept, false);
    if (request.seed.defined()) seed_ = SavedVariable(request.seed, false);
    if (request.weight.defined()) weight_ = SavedVariable(request.weight, false);
  }

  const Declaration& declaration() const { return ops().declarations[op_]; }

  Request saved() const {
    Request request{.op = op_, .arguments = arguments_};
    request.arguments.needs = 0;
    for (int k = 0, edge = 0; k < kMaxOperands; ++k) {
      request.operand[k] = operand_[k].unpack();
      if (request.operand[k].defined())
        request.arguments.needs |= int64_t(task_should_compute_output(edge++)) << k;
    }
    request.kept = kept_.unpack();
    request.seed = seed_.unpack();
    request.weight = weight_.unpack();
    return request;
  }

  TensorList apply(TensorList&& grads) override {
    Request request = saved();
    return of_edges(request, gradients(request, grads));
  }

  TensorList gradients(Request& request, const TensorList& grads) const {
    const Declaration& op = declaration();
    if (std::ranges::none_of(grads, [](const at::Tensor& t) { return t.defined(); }))
      return TensorList(op.operands);
    if (!is_plain(request) || at::GradMode::is_enabled() || !std::ranges::all_of(grads, is_dense))
      return by_definition(request, grads);
    const at::Tensor grad_z = op.z ? grads[0] : at::Tensor();
    const at::Tensor grad_value = op.value() ? grads.back() : at::Tensor();
    int64_t& needs = request.arguments.needs;
    // dz/dmu is 1: the kernel need not copy.
    const bool is_own = !op.value() && (needs & 1) && request.operand[1].defined() &&
                        grad_z.sizes() == request.operand[0].sizes();
    if (is_own) needs &= ~1;
    TensorList results = run(request, Direction::backward, grad_z, grad_value);
    if (is_own) results[0] = grad_z;
    return results;
  }

  // Only operands that are given have an edge.
  static TensorList of_edges(const Request& request, TensorList&& gradients) {
    TensorList results;
    results.reserve(gradients.size());
    for (size_t k = 0; k < gradients.size(); ++k)
      if (request.operand[k].defined()) results.push_back(std::move(gradients[k]));
    return results;
  }

  void release_variables() override {
    for (SavedVariable& operand : operand_) operand.reset_data();
    kept_.reset_data();
    seed_.reset_data();
    weight_.reset_data();
  }

  template <class T>
  static void collect(torch::dynamo::autograd::CompiledNodeArgs& args, const T& value) {
    if constexpr (std::is_same_v<T, Dims>)
      args.collect(std::vector<int64_t>(value.begin(), value.end()));
    else if constexpr (std::is_same_v<T, OptionalBound>)
      for (double number : value.value_or(std::vector<double>())) args.collect(number);
    else
      args.collect(value);
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    for (const SavedVariable& operand : operand_) args.collect(operand, false);
    args.collect(kept_, false);
    args.collect(seed_, false);
    args.collect(weight_, false);
    args.collect(arguments_.grad_value);
    for_each_setting(declaration(), Direction::forward, arguments_,
                     [&](const char*, const auto& value) { collect(args, value); });
  }

  TensorList apply_with_saved(const TensorList& grads,
                              torch::dynamo::autograd::SwapSavedVariables& saved) override {
    for (SavedVariable& operand : operand_) saved.before(operand);
    saved.before(kept_);
    saved.before(seed_);
    saved.before(weight_);
    TensorList results = apply(TensorList(grads));
    for (SavedVariable& operand : operand_) saved.after(operand);
    saved.after(kept_);
    saved.after(seed_);
    saved.after(weight_);
    return results;
  }

 protected:
  int op_ = 0;
  Arguments arguments_;
  std::array<SavedVariable, kMaxOperands> operand_;
  SavedVariable kept_, seed_, weight_;
};

// Of minus the sum of all values times their weight, with gradients that were made with it and are
// kept. Backward multiplies them by the upstream gradient in place, unless that is 1, and gives
// them away; so a second backward pass through the same graph makes them anew.
struct LossNode : OpNode {
  void keep(TensorList&& gradients) { gradients_ = std::move(gradients); }
  const TensorList& kept() const { return gradients_; }

  TensorList apply(TensorList&& grads) override {
    const at::Tensor& grad = grads[0];
    if (gradients_.empty() || !grad.defined() || at::GradMode::is_enabled() || !is_alone() ||
        !is_dense(grad)) {
      if (grad.defined()) grads[0] = at::mul(grad, arguments_.grad_value);
      return OpNode::apply(std::move(grads));
    }
    TensorList results;
    for (int k = 0; k < kMaxOperands; ++k) {
      if (!was_given_[k]) continue;
      results.push_back(std::move(gradients_[k]));
      if (results.back().defined()) multiply_(results.back(), grad);
    }
    gradients_.clear();
    return results;
  }

  void release_variables() override {
    OpNode::release_variables();
    gradients_.clear();
  }

  std::array<bool, kMaxOperands> was_given_{};

 private:
  TensorList gradients_;
};

// Owned by the kind of pointer that this torch has for nodes.
template <class N>
auto make_node() {
  using Pointer = std::decay_t<decltype(torch::autograd::Edge().function)>;
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::shared_ptr<N>(new N(), [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<N>();
}

template <class N>
auto recording(const Request& request) {
  auto node = make_node<N>();
  torch::autograd::edge_list edges;
  for (const at::Tensor& t : request.operand)
    if (t.defined()) edges.push_back(torch::autograd::impl::gradient_edge(t));
  node->set_next_edges(std::move(edges));
  node->save(request);
  return node;
}

bool wants_gradient(const Request& request) {
  return at::GradMode::is_enabled() && std::ranges::any_of(request.operand, [](const auto& t) {
           return t.defined() && t.requires_grad();
         });
}

}  // namespace

// ---- Calls --------------------------------------------------------------------------------------

const Api& ops() { return *the_ops; }

void use(const Api& ops, ByDefinition definition) {
  the_ops = &ops;
  by_definition = definition;
}

TensorList kept_by(const Node& node) {
  const auto* loss = dynamic_cast<const LossNode*>(&node);
  return loss ? loss->kept() : TensorList();
}

bool is_plain(const Request& request) {
  return is_alone() && is_dense(request.kept) && is_dense(request.seed) &&
         is_dense(request.weight) && std::ranges::all_of(request.operand, is_dense);
}

TensorList call(Request& request) {
  if (ops().declarations[request.op].noise && !request.seed.defined())
    request.seed = draw_seed(request.operand[0]);
  const bool record = wants_gradient(request);
  TensorList results;
  {
    const at::NoGradGuard none;
    results = run(request, Direction::forward);
  }
  if (ops().declarations[request.op].signature.keeps) {
    request.kept = std::move(results.back());
    results.pop_back();
  }
  if (record) torch::autograd::set_history(results, recording<OpNode>(request));
  return results;
}

at::Tensor loss(Request& request, bool mean) {
  if (request.operand[0].scalar_type() == at::kHalf) return {};
  at::DimVector shape;
  for (const at::Tensor& t : request.operand)
    if (t.defined() && t.sizes() != at::IntArrayRef(shape))
      shape = at::infer_size_dimvector(shape, t.sizes());
  Arguments& a = request.arguments;
  int64_t rows = 1, all = 1;
  for (size_t d = 0; d < shape.size(); ++d) {
    all *= shape[d];
    if (d + a.event_ndim < shape.size()) rows *= shape[d];
  }
  if (all == 0) return {};
  a.event_ndim = int64_t(shape.size());  // all is one row
  a.grad_value = mean ? -1.0 / double(rows) : -1.0;
  const bool record = wants_gradient(request);
  if (record)
    for (int k = 0; k < kMaxOperands; ++k)
      a.needs |= int64_t(request.operand[k].defined() && request.operand[k].requires_grad()) << k;
  TensorList results;
  {
    const at::NoGradGuard none;
    results = run(request, record ? Direction::with_gradient : Direction::forward);
  }
  at::Tensor loss = std::move(results[0]);
  multiply_scalar_(loss, a.grad_value);
  if (!record) return loss;
  const auto node = recording<LossNode>(request);
  results.erase(results.begin());
  results.resize(kMaxOperands);
  node->keep(std::move(results));
  for (int k = 0; k < kMaxOperands; ++k) node->was_given_[k] = request.operand[k].defined();
  torch::autograd::set_history(loss, node);
  return loss;
}

}  // namespace fastvae
