"""The compiled files of this package, what they are called, and which of them fit.

- `libfastvae.so`: the kernels and `torch.ops.fastvae`. Free of Python, and by libtorch's stable ABI
  the same for every torch from 2.11 on.
- `_C.<Python>.so`: what tells Python of them. Loads the library.
- `_nodes.torch-<release>.<Python>.so`: autograd's nodes in C++, for one torch and one Python.

Free of torch, because setup.py and tools/wheels.py ask too.
"""

from __future__ import annotations

import importlib.util
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

__all__ = ["SUFFIX", "load_nodes", "nodes_file", "nodes_for", "pythons"]

HERE = Path(__file__).parent
SUFFIX = EXTENSION_SUFFIXES[0]  # of this Python, such as .cpython-311-x86_64-linux-gnu.so
_NODES = "_nodes.torch-"


def torch_abi(version: str) -> str:
    """What stands for all torches that one library of nodes serves: 2.13.0 for 2.13.0+cu130.

    PyTorch's builds of one release, for the CPU or any CUDA, have the same headers, as far as the
    nodes include them. A patch release may not: 2.9.1 put functions into the middle of a class of
    2.9.0, which what was compiled before would call by their old places, and nobody would notice.
    Nor is it known of nightly builds, of those from source and of other vendors', so each of these
    is served by what was built for itself alone.
    """
    release = re.fullmatch(r"(\d+\.\d+\.\d+)(\+(cpu|cu\d+))?", version)
    return release[1] if release else version


def nodes_file(torch: str) -> str:
    """The library of nodes for this Python and a version of torch."""
    return f"{_NODES}{torch_abi(torch)}{SUFFIX}"


def nodes_for(here: Path = HERE) -> list[str]:
    """The torches that there are nodes for, under this Python."""
    files = here.glob(f"{_NODES}*{SUFFIX}")
    return sorted(path.name[len(_NODES) : -len(SUFFIX)] for path in files)


def load_nodes(torch: str, here: Path = HERE) -> ModuleType:
    """`fastvae._nodes`, whose functions fastvae/ops/graph.py calls."""
    spec = importlib.util.spec_from_file_location("fastvae._nodes", here / nodes_file(torch))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pythons(here: Path = HERE) -> list[str]:
    """The Pythons that there is a module `_C` for, such as cpython-311-x86_64-linux-gnu."""
    return sorted(path.name.split(".")[1] for path in here.glob("_C.*.so"))
