// The Python module fastvae._C, one for each Python: what the library of kernels is. Importing it
// loads that library, which registers the operators of ops/register.cpp with PyTorch.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "formulas/all.h"
#include "formulas/philox.h"
#include "ops/api.h"

namespace py = pybind11;

namespace {

// The library of kernels, free of Python, which lies beside this module.
const fastvae::Api& load_kernels() {
  Dl_info here;
  if (!dladdr(reinterpret_cast<void*>(&load_kernels), &here))
    throw py::import_error("fastvae._C does not find its own file");
  std::string path = here.dli_fname;
  path.replace(path.rfind('/') + 1, path.npos, "libfastvae.so");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* symbol = library ? dlsym(library, "fastvae_api") : nullptr;
  if (!symbol) throw py::import_error(dlerror());
  const fastvae::Api* api = reinterpret_cast<decltype(&fastvae_api)>(symbol)();
  if (!api->fits()) throw py::import_error("libfastvae.so was built from other sources");
  return *api;
}

// "Rsample::Forward" of the kernels' names, and its inputs, outputs and whether it gives a value.
template <class S>
py::tuple describe_step() {
  std::string_view name =
      __PRETTY_FUNCTION__;  // "... [with S = fastvae::generic::Rsample::Forward; ..."
  name = name.substr(name.find("S = ") + 4);
  name = name.substr(0, name.find_first_of(";]"));
  return py::make_tuple(std::string(name), S::step.inputs, S::step.outputs, S::step.value,
                        S::step.slow, S::step.huge);
}

template <class... S>
py::list describe_steps(fastvae::List<S...>) {
  py::list steps;
  (steps.append(describe_step<S>()), ...);
  return steps;
}

py::object split(const char* text) { return text ? py::str(text).attr("split")(";") : py::none(); }

py::dict build_info(const fastvae::Build& build) {
  using namespace py::literals;
  return py::dict("compiler"_a = build.compiler, "cxx_standard"_a = build.cxx_standard,
                  "torch_built"_a = build.torch, "cuda_version"_a = build.cuda,
                  "cuda_archs"_a = split(build.cuda_archs),
                  "instruction_sets"_a = split(build.instruction_sets));
}

// ---- Doors for the tests into the code that the kernels are made of -----------------------------

py::tuple philox_words(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key_low,
                       uint32_t key_high) {
  const auto words = fastvae::philox(fastvae::Block<uint32_t>{{c0, c1, c2, c3}}, key_low, key_high);
  return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
}

py::tuple box_muller(uint32_t a, uint32_t b) {
  const auto pair = fastvae::box_muller<float>(int32_t(a), int32_t(b));
  return py::make_tuple(pair.first, pair.second);
}

// The functions of math.h, log_sums.h and gamma.h of every element, in the order of
// tests/test_math.py.
template <class R>
py::list elementary(const py::array_t<R, py::array::c_style>& t) {
  constexpr int kFunctions = 14;
  py::list out;
  R* to[kFunctions];
  for (R*& values : to) {
    py::array_t<R> array(t.size());
    values = array.mutable_data();
    out.append(array);
  }
  for (py::ssize_t i = 0; i < t.size(); ++i) {
    const R x = t.data()[i];
    const fastvae::Exp<R> e = fastvae::exp(x);
    const fastvae::ExpBothWays<R> both = fastvae::exp_both_ways(x);
    const fastvae::Softplus<R> s = fastvae::softplus(x);
    const R values[kFunctions] = {e.exp,
                                  e.expm1,
                                  e.tail,
                                  fastvae::log(x),
                                  s.value,
                                  s.sigmoid,
                                  fastvae::log1p(x),
                                  fastvae::log_deviance(x, 1 + x),
                                  fastvae::log_of_ratio(x, 1 + x),
                                  both.up,
                                  both.down,
                                  fastvae::weight(x),
                                  fastvae::stirling(x, 1 / x),
                                  fastvae::digamma_gap(x)};
    for (int k = 0; k < kFunctions; ++k) to[k][i] = values[k];
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native part of fastvae; use it through the fastvae package.";
  const fastvae::Api& api = load_kernels();
  m.def(
      "build_info", [&api] { return build_info(api.build); },
      "What the kernels were built with and for.");
  m.def("cpu_capability", api.cpu_capability, "The instruction set that the kernels use.");
  m.attr("_api") = py::capsule(&api, fastvae::kApiCapsule);
  m.def(
      "_steps", [] { return describe_steps(fastvae::Steps()); },
      "The rows of the kernel tables: name, inputs, outputs, whether there is a value, slow.");
  m.def("_philox_words", &philox_words, "Philox4x32-10 of a counter and a key.");
  m.def("_box_muller", &box_muller, "Two words to two normals.");
  m.def("_elementary_float", &elementary<float>, "The functions of math.h and others.");
  m.def("_elementary_double", &elementary<double>, "The functions of math.h and others.");
}
