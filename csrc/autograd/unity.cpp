// One translation unit: each file would read the headers of PyTorch, which takes longer than all
// else.
#include "arguments.cpp"
#include "module.cpp"
#include "nodes.cpp"
