// From Python's arguments to a request.
//
// Only what is ordinary is taken: tensors of PyTorch's own classes, of one dtype and device, whose
// shapes broadcast, and settings of the usual types. All else is left to the checks of
// fastvae/ops/arguments.py, which make of it what can be made, or say what is wrong.
#pragma once

#include <torch/csrc/python_headers.h>

#include "nodes.h"

namespace fastvae {

// To be called once, with the interpreter's lock held.
void prepare_names();

// The index of the op whose public function has these parameters, tuples of a name and, if there is
// one, a default. -1 after an error in Python.
int register_function(PyObject* name, PyObject* parameters);

// The arguments of an op's public function, or of the loss that ends in it. False if they are not
// ordinary.
bool read_call(PyObject* args, PyObject* kwargs, Request& request);
bool read_loss(PyObject* args, PyObject* kwargs, Request& request, bool& mean);

// Operands and settings that are checked. False if the call is not plain.
bool read_checked(PyObject* operands, PyObject* settings, Request& request);

}  // namespace fastvae
