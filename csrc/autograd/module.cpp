// The Python module fastvae._nodes: an op, called with the arguments of its public function. The
// answer is NotImplemented for all that is not ordinary (arguments.h).
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "arguments.h"
#include "nodes.h"

namespace fastvae {
namespace {

std::array<PyObject*, kOps> gradients{};  // Kernels.gradients (fastvae/ops/graph.py)

struct GilReleased {
  PyThreadState* state = PyEval_SaveThread();
  ~GilReleased() { PyEval_RestoreThread(state); }
};

struct GilHeld {
  PyGILState_STATE state = PyGILState_Ensure();
  ~GilHeld() { PyGILState_Release(state); }
};

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

PyObject* to_python(double value) { return PyFloat_FromDouble(value); }
PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
PyObject* to_python(bool value) { return PyBool_FromLong(value); }
PyObject* to_python(const Dims& dims) {
  return tuple_of(dims.size(), [&](size_t d) { return to_python(dims[d]); });
}
PyObject* to_python(const OptionalBound& bound) {
  if (!bound) Py_RETURN_NONE;
  return tuple_of(bound->size(), [&](size_t k) { return to_python((*bound)[k]); });
}

PyObject* settings_of(const Request& request) {
  std::vector<PyObject*> values;
  for_each_setting(ops().declarations[request.op], Direction::forward, request.arguments,
                   [&](const char*, const auto& value) { values.push_back(to_python(value)); });
  return tuple_of(values.size(), [&](size_t k) { return values[k]; });
}

TensorList run_definition(const Request& request, const TensorList& grads) {
  const GilHeld held;
  const Declaration& op = ops().declarations[request.op];
  TensorList tensors(request.operand.begin(), request.operand.begin() + op.operands);
  if (op.signature.keeps) tensors.push_back(request.kept);
  if (op.noise) tensors.push_back(request.seed);
  if (op.sums()) tensors.push_back(request.weight);
  const THPObjectPtr saved(
      tuple_of(tensors.size(), [&](size_t k) { return to_python(tensors[k]); }));
  const THPObjectPtr settings(settings_of(request));
  const THPObjectPtr needs(tuple_of(size_t(op.operands), [&](size_t k) {
    return PyBool_FromLong(request.arguments.needs >> k & 1);
  }));
  const THPObjectPtr upstream(
      tuple_of(grads.size(), [&](size_t k) { return to_python(grads[k]); }));
  THPObjectPtr found(PyObject_CallFunctionObjArgs(
      gradients[request.op], saved.get(), settings.get(), needs.get(), upstream.get(), nullptr));
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
  if (!read_call(args[1], args[2], request)) Py_RETURN_NOTIMPLEMENTED;
  return to_python(without_gil(request, [&] { return call(request); }));
  END_HANDLE_TH_ERRORS
}

// loss(index, args, kwargs): what the public function returns that ends in a loss.
PyObject* py_loss(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Request request{.op = int(PyLong_AsLong(args[0]))};
  bool mean = true;
  if (!read_loss(args[1], args[2], request, mean)) Py_RETURN_NOTIMPLEMENTED;
  const at::Tensor result = without_gil(request, [&] { return loss(request, mean); });
  if (!result.defined()) Py_RETURN_NOTIMPLEMENTED;
  return to_python(result);
  END_HANDLE_TH_ERRORS
}

// run(index, operands, settings): what the op returns.
PyObject* py_run(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Request request{.op = int(PyLong_AsLong(args[0]))};
  if (!read_checked(args[1], args[2], request)) Py_RETURN_NOTIMPLEMENTED;
  return to_python(without_gil(request, [&] { return call(request); }));
  END_HANDLE_TH_ERRORS
}

// register(name, parameters, gradients): the index of the op of that name. Each parameter is its
// name and, if it has one, its default.
PyObject* py_register(PyObject*, PyObject* const* args, Py_ssize_t) {
  const int op = register_function(args[0], args[1]);
  if (op < 0) return nullptr;
  gradients[op] = Py_NewRef(args[2]);
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
  if (!api->fits()) {
    PyErr_SetString(PyExc_ImportError, "libfastvae.so was built from other sources");
    return nullptr;
  }
  use(*api, run_definition);
  prepare_names();
  return PyModule_Create(&definition);
}
