#include "arguments.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <string_view>

namespace fastvae {
namespace {

// What a parameter of a public function is to its op: an operand, or one of these.
enum Parameter {
  kOperand,
  kParam = kMaxOperands,
  kBound,
  kEventNdim,
  kSampleShape,
  kPathDerivative,
  kBins,
  kLow,
  kHigh,
  kSeed,
  kGenerator,
  kWeight,
  kMinStd,
  kPriorParam,
  kBalance,
  kReduction,
  kParameters
};
constexpr const char* kNames[kReduction - kMaxOperands] = {
    "param", "bound", "event_ndim", "sample_shape", "path_derivative", "bins",        "low",
    "high",  "seed",  "generator",  "weight",       "min_std",         "prior_param", "balance"};

using Values = std::array<PyObject*, kParameters>;

struct PublicFunction {
  std::vector<std::pair<PyObject*, int>> parameters;  // in order, by interned name
  Values defaults{};                                  // null: none
};
std::array<PublicFunction, kOps> functions;
std::array<std::vector<PyObject*>, kOps> params;  // the names of `param`, by the kernels' codes
PyObject *reduction = nullptr, *mean = nullptr, *sum = nullptr;  // names, too

// Whether each argument has a parameter of its own; that of a loss, `reduction`, is by keyword.
bool match(const PublicFunction& function, PyObject* args, PyObject* kwargs, Values& values) {
  const size_t positional = size_t(PyTuple_GET_SIZE(args));
  if (positional > size_t(ops().declarations[&function - functions.data()].operands)) return false;
  values = function.defaults;
  for (size_t k = 0; k < positional; ++k)
    values[function.parameters[k].second] = PyTuple_GET_ITEM(args, Py_ssize_t(k));
  PyObject *name = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &name, &value);) {
    size_t k = positional;
    while (k < function.parameters.size() && function.parameters[k].first != name) ++k;
    if (k < function.parameters.size())
      values[function.parameters[k].second] = value;
    else if (name == reduction)
      values[kReduction] = value;
    else
      return false;
  }
  return true;
}

bool read(PyObject* value, int64_t& to) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow = 0;
  to = PyLong_AsLongLongAndOverflow(value, &overflow);
  return !overflow;
}

bool read(PyObject* value, double& to) {
  if (PyLong_CheckExact(value)) {
    int64_t whole = 0;
    const bool fits = read(value, whole) && whole == int64_t(double(whole));
    to = double(whole);
    return fits;
  }
  if (!PyFloat_CheckExact(value)) return false;
  to = PyFloat_AS_DOUBLE(value);
  return true;
}

bool read(PyObject* value, bool& to) {
  to = value == Py_True;
  return PyBool_Check(value);
}

bool read(PyObject* value, at::Tensor& to) {
  if (!THPVariable_CheckExact(value)) return false;
  to = THPVariable_Unpack(value);
  return true;
}

bool read(PyObject* value, Dims& to) {
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) > 8) return false;  // torch.Size too
  for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(value); ++d) {
    int64_t size = 0;
    if (!read(PyTuple_GET_ITEM(value, d), size) || size < 0) return false;
    to.push_back(size);
  }
  return true;
}

bool read_param(const std::vector<PyObject*>& names, PyObject* value, int64_t& to) {
  for (to = 0; to < int64_t(names.size()); ++to)
    if (value == names[to]) return true;  // interned, as literals are
  return false;
}

bool given(PyObject* value) { return value && value != Py_None; }

// A bound in numbers.
bool read(PyObject* value, OptionalBound& to) {
  if (!given(value)) return true;
  if (!PyTuple_CheckExact(value)) return false;
  to.emplace();
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(value); ++k) {
    to->emplace_back();
    if (!read(PyTuple_GET_ITEM(value, k), to->back())) return false;
  }
  return true;
}

// A fastvae.Bound.
bool read_bound(PyObject* value, OptionalBound& to) {
  THPObjectPtr numbers(PyObject_GetAttrString(value, "numbers"));
  if (!numbers) PyErr_Clear();
  return numbers && read(numbers.get(), to);
}

// Whether the operands are of one type and device and broadcast; and their number of dimensions.
bool match_operands(const Request& request, int64_t& ndim) {
  constexpr int64_t kMost = 7;  // as fastvae/ops/arguments.py
  const at::Tensor& first = request.operand[0];
  const auto type = first.scalar_type();
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf)
    return false;
  for (const at::Tensor& t : request.operand)
    if (t.defined() && (t.is_nested() || t.layout() != at::kStrided)) return false;
  ndim = first.dim();
  bool same = true;
  for (const at::Tensor& t : request.operand)
    if (t.defined()) {
      if (t.scalar_type() != type || t.device() != first.device()) return false;
      same &= t.sizes() == first.sizes();
      ndim = std::max(ndim, t.dim());
    }
  if (same) return true;
  if (ndim > kMost) return false;
  for (int64_t d = 1; d <= ndim; ++d) {
    int64_t size = 1;
    for (const at::Tensor& t : request.operand)
      if (t.defined() && t.dim() >= d && t.size(-d) != 1) {
        if (size != 1 && size != t.size(-d)) return false;
        size = t.size(-d);
      }
  }
  return true;
}

// Whether it multiplies what is summed: of the type that sums have, or a mask that is made one, a
// constant, and broadcasting to the operands.
bool match_weight(Request& request) {
  at::Tensor& weight = request.weight;
  const at::Tensor& first = request.operand[0];
  const auto type = first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (weight.is_nested() || weight.layout() != at::kStrided || weight.device() != first.device() ||
      weight.requires_grad())
    return false;
  if (weight.scalar_type() == at::kBool && is_plain(request)) weight = weight.to(type);
  if (weight.scalar_type() != type) return false;
  for (int64_t d = 1; d <= weight.dim(); ++d)
    if (std::ranges::none_of(request.operand, [&](const at::Tensor& t) {
          return t.defined() && t.dim() >= d &&
                 (weight.size(-d) == 1 || t.size(-d) == weight.size(-d));
        }))
      return false;
  return true;
}

// Whether all is ordinary.
bool read_request(const Values& values, Request& request) {
  const Declaration& op = ops().declarations[request.op];
  Arguments& a = request.arguments;
  int operands = op.operands;
  if (op.signature.gaussians && !given(values[operands - 1]))
    for (; operands > 2 && !given(values[operands - 1]); --operands) {
    }
  for (int k = 0; k < operands; ++k) {
    if (!values[k]) return false;
    if (op.signature.number && k == op.operands - 1 && read(values[k], a.number)) continue;
    if (!read(values[k], request.operand[k])) return false;
  }
  if (operands % 2 && op.signature.gaussians) return false;
  int64_t ndim = 0;
  if (!match_operands(request, ndim)) return false;

  if (given(values[kWeight]) && !(read(values[kWeight], request.weight) && match_weight(request)))
    return false;
  if (values[kParam] && !read_param(params[request.op], values[kParam], a.param)) return false;
  if (given(values[kBound]) && (a.param != 0 || !read_bound(values[kBound], a.bound))) return false;
  if (op.sums()) {
    a.event_ndim = std::max<int64_t>(ndim - 1, 0);
    if (given(values[kEventNdim]) &&
        (!read(values[kEventNdim], a.event_ndim) || a.event_ndim < 0 || a.event_ndim > ndim))
      return false;
  }
  if (values[kBalance] && !(read(values[kBalance], a.balance) && a.balance >= 0 && a.balance <= 1))
    return false;
  if (values[kSampleShape] && !read(values[kSampleShape], a.sample_shape)) return false;
  if (values[kPathDerivative] && !read(values[kPathDerivative], a.path_derivative)) return false;
  if (op.signature.levels && (!read(values[kBins], a.bins) || !read(values[kLow], a.low) ||
                              !read(values[kHigh], a.high) || a.bins < 2 || !(a.low < a.high)))
    return false;
  double min_std = 0;
  if (values[kMinStd] && !(read(values[kMinStd], min_std) && min_std == 0)) return false;
  if (given(values[kGenerator]) || given(values[kPriorParam])) return false;
  if (given(values[kSeed])) {
    const at::Tensor& seed = request.seed;
    if (!read(values[kSeed], request.seed) || seed.scalar_type() != at::kLong ||
        seed.device() != request.operand[0].device() || seed.dim() != 0)
      return false;
  }
  return is_plain(request);
}

bool read(PyObject* args, PyObject* kwargs, Request& request, Values& values) {
  return !at::impl::torch_function_mode_enabled() &&
         match(functions[request.op], args, kwargs, values) && read_request(values, request);
}

}  // namespace

void prepare_names() {
  reduction = PyUnicode_InternFromString("reduction");
  mean = PyUnicode_InternFromString("mean");
  sum = PyUnicode_InternFromString("sum");
  for (int op = 0; op < kOps; ++op) {
    const Declaration& declaration = ops().declarations[op];
    std::vector<const char*> names{"logvar", "log_std", "std", "var"};
    if (declaration.counts())
      names.assign(std::begin(declaration.signature.rates), std::end(declaration.signature.rates));
    for (const char* name : names) params[op].push_back(PyUnicode_InternFromString(name));
  }
}

int register_function(PyObject* op_name, PyObject* parameters) {
  const char* name = PyUnicode_AsUTF8(op_name);
  int op = 0;
  while (name && op < kOps && std::string_view(ops().declarations[op].signature.name) != name) ++op;
  if (!name || op == kOps) {
    PyErr_Format(PyExc_ValueError, "no op %R", op_name);
    return -1;
  }
  PublicFunction& function = functions[op];
  function.parameters.clear();
  const Declaration& declaration = ops().declarations[op];
  for (Py_ssize_t k = 0; k < PyTuple_Size(parameters); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(parameters, k);
    PyObject* parameter = Py_NewRef(PyTuple_GetItem(pair, 0));
    PyUnicode_InternInPlace(&parameter);
    const std::string_view text = PyUnicode_AsUTF8(parameter);
    int place = 0;
    while (place < declaration.operands && text != declaration.signature.operands[place]) ++place;
    if (place == declaration.operands)
      for (place = kMaxOperands; place < kReduction && text != kNames[place - kMaxOperands];)
        ++place;
    if (place == kReduction) {
      PyErr_Format(PyExc_ValueError, "%s has an unknown parameter, %R", name, parameter);
      return -1;
    }
    function.parameters.emplace_back(parameter, place);
    if (PyTuple_Size(pair) > 1) function.defaults[place] = Py_NewRef(PyTuple_GetItem(pair, 1));
  }
  return op;
}

bool read_call(PyObject* args, PyObject* kwargs, Request& request) {
  Values values;
  return read(args, kwargs, request, values) && !values[kReduction];
}

bool read_loss(PyObject* args, PyObject* kwargs, Request& request, bool& is_mean) {
  Values values;
  if (!read(args, kwargs, request, values)) return false;
  const PyObject* how = values[kReduction] ? values[kReduction] : mean;
  is_mean = how == mean;
  return is_mean || how == sum;
}

bool read_checked(PyObject* operands, PyObject* settings, Request& request) {
  const Declaration& op = ops().declarations[request.op];
  const THPObjectPtr sequence(PySequence_Fast(operands, "the operands are no sequence"));
  if (!sequence) throw python_error();
  const Py_ssize_t given_operands = PySequence_Fast_GET_SIZE(sequence.get());
  for (Py_ssize_t k = 0; k < std::min<Py_ssize_t>(op.operands, given_operands); ++k) {
    PyObject* operand = PySequence_Fast_GET_ITEM(sequence.get(), k);
    if (operand == Py_None) continue;
    if (!THPVariable_Check(operand)) return false;
    request.operand[k] = THPVariable_Unpack(operand);
  }
  PyObject* seed = op.noise ? PyDict_GetItemString(settings, "seed") : nullptr;
  if (given(seed)) request.seed = THPVariable_Unpack(seed);
  PyObject* weight = op.sums() ? PyDict_GetItemString(settings, "weight") : nullptr;
  if (given(weight)) request.weight = THPVariable_Unpack(weight);
  bool taken = true;
  for_each_setting(op, Direction::forward, request.arguments, [&](const char* name, auto& to) {
    PyObject* value = PyDict_GetItemString(settings, name);
    taken = taken && value && read(value, to);
  });
  return taken && is_plain(request);
}

}  // namespace fastvae
