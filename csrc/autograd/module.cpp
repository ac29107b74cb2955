// The Python module fastvae._nodes: an op, called with the arguments of its public function.
//
// Only what is ordinary is taken: tensors of PyTorch's own classes, of one dtype and device, whose
// shapes broadcast, and settings of the usual types. For all else the answer is NotImplemented, and
// the checks of fastvae/ops/arguments.py make of it what can be made, or say what is wrong.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <string_view>

#include "nodes.h"

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
  kReduction,
  kParameters
};
constexpr const char* kNames[kReduction - kMaxOperands] = {
    "param", "bound", "event_ndim", "sample_shape", "path_derivative",
    "bins",  "low",   "high",       "seed",         "generator"};

using Values = std::array<PyObject*, kParameters>;

struct PublicFunction {
  PyObject* gradients = nullptr;                      // Kernels.gradients (fastvae/ops/graph.py)
  std::vector<std::pair<PyObject*, int>> parameters;  // in order, by interned name
  Values defaults{};                                  // null: none
};
std::array<PublicFunction, kOps> functions;
std::array<PyObject*, 4> params;  // the names that `param` has, by the kernels' codes
PyObject *reduction = nullptr, *mean = nullptr, *sum = nullptr;  // names, too

struct GilReleased {
  PyThreadState* state = PyEval_SaveThread();
  ~GilReleased() { PyEval_RestoreThread(state); }
};

struct GilHeld {
  PyGILState_STATE state = PyGILState_Ensure();
  ~GilHeld() { PyGILState_Release(state); }
};

// ---- From the arguments of a public function ----------------------------------------------------

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

bool read_param(PyObject* value, int64_t& to) {
  for (to = 0; to < int64_t(params.size()); ++to)
    if (value == params[to]) return true;  // interned, as literals are
  return false;
}

bool read_bound(PyObject* value, std::optional<std::vector<double>>& to) {
  const THPObjectPtr numbers(PyObject_GetAttrString(value, "numbers"));
  if (!numbers || !PyTuple_CheckExact(numbers.get())) {
    PyErr_Clear();
    return false;
  }
  to.emplace();
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(numbers.get()); ++k) {
    to->emplace_back();
    if (!read(PyTuple_GET_ITEM(numbers.get(), k), to->back())) return false;
  }
  return true;
}

bool given(PyObject* value) { return value && value != Py_None; }

// Whether the operands are of one type and device and broadcast; and their number of dimensions.
bool match_operands(const Request& request, int64_t& ndim) {
  constexpr int64_t kMost = 7;  // as fastvae/ops/arguments.py
  const at::Tensor& first = request.operand[0];
  const auto type = first.scalar_type();
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf)
    return false;
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

  if (values[kParam] && !read_param(values[kParam], a.param)) return false;
  if (given(values[kBound]) && (a.param != 0 || !read_bound(values[kBound], a.bound))) return false;
  if (op.sums()) {
    a.event_ndim = std::max<int64_t>(ndim - 1, 0);
    if (given(values[kEventNdim]) &&
        (!read(values[kEventNdim], a.event_ndim) || a.event_ndim < 0 || a.event_ndim > ndim))
      return false;
  }
  if (values[kSampleShape] && !read(values[kSampleShape], a.sample_shape)) return false;
  if (values[kPathDerivative] && !read(values[kPathDerivative], a.path_derivative)) return false;
  if (op.signature.levels && (!read(values[kBins], a.bins) || !read(values[kLow], a.low) ||
                              !read(values[kHigh], a.high) || a.bins < 2 || !(a.low < a.high)))
    return false;
  if (given(values[kGenerator])) return false;
  if (given(values[kSeed])) {
    const at::Tensor& seed = request.seed;
    if (!read(values[kSeed], request.seed) || seed.scalar_type() != at::kLong ||
        seed.device() != request.operand[0].device() || seed.dim() != 0)
      return false;
  }
  return is_plain(request);
}

// ---- From operands and settings that are checked ------------------------------------------------

template <class T>
void take(PyObject* settings, const char* name, T& to) {
  PyObject* value = PyDict_GetItemString(settings, name);
  if (!value || !read(value, to)) throw torch::TypeError(std::string("no setting ") + name);
}

bool take_request(PyObject* operands, PyObject* settings, Request& request) {
  const Declaration& op = ops().declarations[request.op];
  Arguments& a = request.arguments;
  const THPObjectPtr sequence(PySequence_Fast(operands, "the operands are no sequence"));
  if (!sequence) throw python_error();
  for (Py_ssize_t k = 0;
       k < std::min<Py_ssize_t>(op.operands, PySequence_Fast_GET_SIZE(sequence.get())); ++k) {
    PyObject* operand = PySequence_Fast_GET_ITEM(sequence.get(), k);
    if (operand == Py_None) continue;
    if (!THPVariable_Check(operand)) return false;
    request.operand[k] = THPVariable_Unpack(operand);
  }
  if (op.signature.number) take(settings, op.signature.number, a.number);
  if (op.noise) {
    PyObject* seed = PyDict_GetItemString(settings, "seed");
    if (given(seed)) request.seed = THPVariable_Unpack(seed);
  }
  if (op.scale_form) take(settings, "param", a.param);
  if (op.signature.gaussians) take(settings, "packed_dim", a.packed_dim);
  if (op.signature.levels) {
    take(settings, "bins", a.bins);
    take(settings, "low", a.low);
    take(settings, "high", a.high);
  }
  if (op.sums()) take(settings, "event_ndim", a.event_ndim);
  if (op.signature.samples) take(settings, "sample_shape", a.sample_shape);
  if (op.path) take(settings, "path_derivative", a.path_derivative);
  PyObject* bound = op.scale_form ? PyDict_GetItemString(settings, "bound") : nullptr;
  if (given(bound)) {
    a.bound.emplace();
    for (Py_ssize_t k = 0; k < PyTuple_Size(bound); ++k) {
      a.bound->emplace_back();
      if (!read(PyTuple_GET_ITEM(bound, k), a.bound->back())) return false;
    }
  }
  return is_plain(request);
}

// ---- To Python ----------------------------------------------------------------------------------

template <class F>
PyObject* tuple_of(size_t size, const F& item) {
  THPObjectPtr tuple(PyTuple_New(Py_ssize_t(size)));
  if (!tuple) throw python_error();
  for (size_t k = 0; k < size; ++k) PyTuple_SET_ITEM(tuple.get(), Py_ssize_t(k), item(k));
  return tuple.release();
}

PyObject* to_python(const at::Tensor& tensor) {
  if (!tensor.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(tensor);
}

PyObject* to_python(const TensorList& tensors) {
  if (tensors.size() == 1) return to_python(tensors[0]);
  return tuple_of(tensors.size(), [&](size_t k) { return to_python(tensors[k]); });
}

// In the order of the schema, without the seed.
PyObject* settings_of(const Request& request) {
  const Declaration& op = ops().declarations[request.op];
  const Arguments& a = request.arguments;
  const auto numbers = [](const auto& list) {
    return tuple_of(list.size(), [&](size_t k) {
      if constexpr (std::is_same_v<std::decay_t<decltype(list[k])>, double>)
        return PyFloat_FromDouble(list[k]);
      else
        return PyLong_FromLongLong(list[k]);
    });
  };
  std::vector<PyObject*> values;
  if (op.signature.number) values.push_back(PyFloat_FromDouble(a.number));
  if (op.scale_form) values.push_back(PyLong_FromLongLong(a.param));
  if (op.signature.gaussians) values.push_back(PyLong_FromLongLong(a.packed_dim));
  if (op.signature.levels)
    values.insert(values.end(), {PyLong_FromLongLong(a.bins), PyFloat_FromDouble(a.low),
                                 PyFloat_FromDouble(a.high)});
  if (op.sums()) values.push_back(PyLong_FromLongLong(a.event_ndim));
  if (op.signature.samples) values.push_back(numbers(a.sample_shape));
  if (op.path) values.push_back(PyBool_FromLong(a.path_derivative));
  if (op.scale_form) values.push_back(a.bound ? numbers(*a.bound) : Py_NewRef(Py_None));
  return tuple_of(values.size(), [&](size_t k) { return values[k]; });
}

TensorList by_definition(const Request& request, const TensorList& grads) {
  const GilHeld held;
  const Declaration& op = ops().declarations[request.op];
  const THPObjectPtr saved(tuple_of(size_t(op.operands + op.noise), [&](size_t k) {
    return to_python(k < size_t(op.operands) ? request.operand[k] : request.seed);
  }));
  const THPObjectPtr settings(settings_of(request));
  const THPObjectPtr needs(tuple_of(size_t(op.operands), [&](size_t k) {
    return PyBool_FromLong(request.arguments.needs >> k & 1);
  }));
  const THPObjectPtr upstream(
      tuple_of(grads.size(), [&](size_t k) { return to_python(grads[k]); }));
  THPObjectPtr found(PyObject_CallFunctionObjArgs(functions[request.op].gradients, saved.get(),
                                                  settings.get(), needs.get(), upstream.get(),
                                                  nullptr));
  const THPObjectPtr sequence(found ? PySequence_Fast(found.get(), "no gradients") : nullptr);
  if (!sequence) {
    python_error error;
    error.persist();
    throw error;
  }
  TensorList results;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(sequence.get()); ++k) {
    PyObject* gradient = PySequence_Fast_GET_ITEM(sequence.get(), k);
    results.push_back(gradient == Py_None ? at::Tensor() : THPVariable_Unpack(gradient));
  }
  return results;
}

// ---- The functions of the module ----------------------------------------------------------------

// What other threads could do meanwhile must be worth the exchange.
template <class F>
auto without_gil(const Request& request, const F& f) {
  constexpr int64_t kWorthIt = 1 << 14;
  if (request.operand[0].numel() < kWorthIt) return f();
  const GilReleased released;
  return f();
}

// call(index, args, kwargs): what the public function returns.
PyObject* py_call(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Request request{.op = int(PyLong_AsLong(args[0]))};
  Values values;
  if (at::impl::torch_function_mode_enabled() ||
      !match(functions[request.op], args[1], args[2], values) || values[kReduction] ||
      !read_request(values, request))
    Py_RETURN_NOTIMPLEMENTED;
  return to_python(without_gil(request, [&] { return call(request); }));
  END_HANDLE_TH_ERRORS
}

// loss(index, args, kwargs): what the public function returns that ends in a loss.
PyObject* py_loss(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Request request{.op = int(PyLong_AsLong(args[0]))};
  Values values;
  if (at::impl::torch_function_mode_enabled() ||
      !match(functions[request.op], args[1], args[2], values) || !read_request(values, request))
    Py_RETURN_NOTIMPLEMENTED;
  const PyObject* how = values[kReduction] ? values[kReduction] : mean;
  if (how != mean && how != sum) Py_RETURN_NOTIMPLEMENTED;
  const at::Tensor result = without_gil(request, [&] { return loss(request, how == mean); });
  if (!result.defined()) Py_RETURN_NOTIMPLEMENTED;
  return to_python(result);
  END_HANDLE_TH_ERRORS
}

// run(index, operands, settings): what the op returns.
PyObject* py_run(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Request request{.op = int(PyLong_AsLong(args[0]))};
  if (!take_request(args[1], args[2], request)) Py_RETURN_NOTIMPLEMENTED;
  return to_python(without_gil(request, [&] { return call(request); }));
  END_HANDLE_TH_ERRORS
}

// register(name, parameters, gradients): the index of the op of that name. Each parameter is its
// name and, if it has one, its default.
PyObject* py_register(PyObject*, PyObject* const* args, Py_ssize_t) {
  const char* name = PyUnicode_AsUTF8(args[0]);
  int op = 0;
  while (name && op < kOps && std::string_view(ops().declarations[op].signature.name) != name) ++op;
  if (!name || op == kOps) return PyErr_Format(PyExc_ValueError, "no op %R", args[0]);
  PublicFunction& function = functions[op];
  function.gradients = Py_NewRef(args[2]);
  function.parameters.clear();
  const Declaration& declaration = ops().declarations[op];
  for (Py_ssize_t k = 0; k < PyTuple_Size(args[1]); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(args[1], k);
    PyObject* parameter = Py_NewRef(PyTuple_GetItem(pair, 0));
    PyUnicode_InternInPlace(&parameter);
    const std::string_view text = PyUnicode_AsUTF8(parameter);
    int place = 0;
    while (place < declaration.operands && text != declaration.signature.operands[place]) ++place;
    if (place == declaration.operands)
      for (place = kMaxOperands; place < kReduction && text != kNames[place - kMaxOperands];)
        ++place;
    if (place == kReduction)
      return PyErr_Format(PyExc_ValueError, "%s has a parameter %R, which is unknown", name,
                          parameter);
    function.parameters.emplace_back(parameter, place);
    if (PyTuple_Size(pair) > 1) function.defaults[place] = Py_NewRef(PyTuple_GetItem(pair, 1));
  }
  return PyLong_FromLong(op);
}

// kept(grad_fn): the gradients that a loss keeps.
PyObject* py_kept(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  if (!torch::autograd::THPCppFunction_Check(args[0])) return PyTuple_New(0);
  const auto& node = *reinterpret_cast<torch::autograd::THPCppFunction*>(args[0])->cdata;
  const TensorList kept = kept_by(node);
  return tuple_of(kept.size(), [&](size_t k) { return to_python(kept[k]); });
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t), int kArguments>
PyObject* checked(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  if (n == kArguments) return f(self, args, n);
  return PyErr_Format(PyExc_TypeError, "takes %d arguments, not %zd", kArguments, n);
}

template <PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t), int kArguments>
PyMethodDef method(const char* name) {
  void* function = reinterpret_cast<void*>(&checked<f, kArguments>);
  return {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, nullptr};
}

}  // namespace
}  // namespace fastvae

PyMODINIT_FUNC PyInit__nodes() {
  using namespace fastvae;
  static PyMethodDef methods[] = {method<py_call, 3>("call"), method<py_loss, 3>("loss"),
                                  method<py_run, 3>("run"),   method<py_register, 3>("register"),
                                  method<py_kept, 1>("kept"), {}};
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "fastvae._nodes",
                                "Nodes of autograd's graph; use them through the fastvae package.",
                                -1, methods};
  const auto* api = static_cast<const Api*>(PyCapsule_Import(kApiCapsule, 0));
  if (!api) return nullptr;
  if (api->ops != kOps || api->size != Api().size) {
    PyErr_SetString(PyExc_ImportError, "fastvae._C was built from other sources");
    return nullptr;
  }
  use(*api, by_definition);
  reduction = PyUnicode_InternFromString("reduction");
  mean = PyUnicode_InternFromString("mean");
  sum = PyUnicode_InternFromString("sum");
  int code = 0;
  for (const char* name : {"logvar", "log_std", "std", "var"})
    params[code++] = PyUnicode_InternFromString(name);
  return PyModule_Create(&definition);
}
