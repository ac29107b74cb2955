"""Which path computes: the compiled kernels ("native") or one of three in plain PyTorch.

- "eager": formulas as one would write them without this package, with PyTorch's own noise unless a
  seed is given. What "native" falls back to where there are no kernels for a tensor's device.
- "reference": the definitions, with the noise that a seed stands for.
- "compiled": the definitions by `torch.compile`, which makes one kernel of noise, sampling and KL
  where it has a compiler for the device: ROCm, XPU, CUDA without nvcc.

Importing this module loads the binary `fastvae._C` and with it the kernels, which registers
`torch.ops.fastvae`. A binary that is missing or does not load never raises: it means the eager path
and one warning.
"""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch  # before the binary, whose undefined symbols are torch's
from torch import Tensor

from . import binaries
from .advice import advice, version

__all__ = [
    "CHOICES",
    "HAS_BINARY",
    "HAS_CPU",
    "HAS_CUDA",
    "info",
    "lacks",
    "native_enabled",
    "path",
    "use_backend",
    "version",
]

CHOICES = ("native", "eager", "reference", "compiled")
_VARIABLE = "FASTVAE_BACKEND"


def _load_binary() -> tuple[ModuleType | None, str]:
    """`fastvae._C` and "", or None and the reason why there is none."""
    try:
        return importlib.import_module("fastvae._C"), ""
    except ModuleNotFoundError:
        if others := binaries.pythons():
            return None, f"the binary does not load: it is for other Pythons, {', '.join(others)}"
        record = binaries.HERE / "_no_binary.txt"  # written by setup.py
        reason = record.read_text(encoding="utf-8").strip() if record.is_file() else ""
        return None, f"no binary was built: {reason or 'the extension was never compiled'}"
    except Exception as error:  # another torch's or Python's ABI, a missing library
        return None, f"the binary does not load: {type(error).__name__}: {error}"


def _choice(name: str, value: str, choices: tuple[str, ...] = CHOICES) -> str:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; want one of {', '.join(map(repr, choices))}")
    return value


_wanted = _choice(_VARIABLE, os.environ.get(_VARIABLE) or "native")
if capability := os.environ.get("FASTVAE_CPU_CAPABILITY"):  # read by the binary
    _choice("FASTVAE_CPU_CAPABILITY", capability, ("avx512", "avx2", "baseline", "none"))
_binary, _problem = _load_binary()
_chosen = "eager" if _binary is None and _wanted == "native" else _wanted
_native = _chosen == "native"
HAS_BINARY = _binary is not None
HAS_CPU: bool = _binary is not None and _binary.cpu_capability() != "none"
HAS_CUDA: bool = _binary is not None and _binary.build_info()["cuda_archs"] is not None
if _binary is None and _wanted == "native":
    warnings.warn(
        f"fastvae runs without its kernels, as fast as plain PyTorch; {_problem}\n"
        f"`python -m fastvae info` says what to do; {_VARIABLE}=eager accepts it silently.",
        RuntimeWarning,
        stacklevel=2,
    )


def _load_nodes() -> tuple[Any, str]:
    """Autograd's nodes in C++, and why: or None, and why Python's Functions take their place."""
    if _binary is None:
        return None, "no binary"
    if not HAS_CPU:
        return None, "no kernels for this processor"
    if os.environ.get("FASTVAE_NODES") == "0":
        return None, "FASTVAE_NODES=0"
    built = binaries.nodes_for()
    if binaries.torch_abi(torch.__version__) not in built:
        return None, f"built for torch {', '.join(built)}" if built else "none for this Python"
    try:
        return binaries.load_nodes(torch.__version__), "built for this torch"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


_nodes, _nodes_reason = _load_nodes()


_lacking: list[str] = []


def lacks(op: str) -> None:
    """Remember, and warn once, that the binary has no kernels for an op, being older or newer than
    this code."""
    if not _lacking and _wanted == "native":
        warnings.warn(
            f"fastvae's binary is not of this version: without kernels for {op}, among others; "
            "`python -m fastvae info` says what to do",
            RuntimeWarning,
            stacklevel=2,
        )
    _lacking.append(op)


def nodes() -> Any:
    """The library of autograd nodes in C++, or None."""
    return _nodes


def native_enabled() -> bool:
    """Whether the compiled kernels compute now.

    A plain global, read on every call of an op: 20 ns, and torch.compile guards on it.
    """
    return _native


def path(tensor: Tensor) -> str:
    """What computes with a tensor of this device now, one of `CHOICES`."""
    if not _native:
        return _chosen
    if (tensor.is_cpu and HAS_CPU) or (tensor.is_cuda and HAS_CUDA):
        return "native"
    return "eager"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute inside the `with` block by one of these:

    - "native": the compiled kernels; "eager" for devices that have none.
    - "eager": plain PyTorch, at the speed of what one would write without this package. Noise is
      drawn from PyTorch's generator and kept for backward; an explicit `seed` means the noise that
      it stands for, as everywhere.
    - "reference": the definitions, `fastvae.reference`.
    - "compiled": the definitions by `torch.compile`, with the kernels' noise. It compiles when an
      op is first called in a new way, and cannot be differentiated twice.

    Like PyTorch's own backend flags, the choice holds for the whole process, so that backward
    passes on autograd's threads follow it too. Not meant to differ between threads.
    """
    global _chosen, _native
    _choice("name", name)
    if name == "native" and _binary is None:
        raise RuntimeError(f"use_backend('native') is not possible: {_problem}")
    before = _chosen
    _chosen, _native = name, name == "native"
    try:
        yield
    finally:
        _chosen, _native = before, before == "native"


def info() -> dict[str, Any]:
    """What computes and why, what the binary was built from and for, and what to do about problems.

    Every value is JSON-serializable. `build` is None without a binary.
    """
    if _native:
        reason = "the binary loaded"
    elif _chosen == "eager" and _binary is None:
        reason = _problem
    else:
        reason = f"chosen by {_VARIABLE} or use_backend"
    build = dict(_binary.build_info()) if _binary is not None else None
    devices = _cuda_devices()
    return {
        "fastvae": version(),
        "backend": _chosen,
        "reason": reason,
        "autograd": f"{'C++' if _nodes else 'Python'} nodes ({_nodes_reason})",
        "build": build,
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": getattr(_binary, "cpu_capability", lambda: None)(),
        "threads": torch.get_num_threads(),
        "cuda_devices": devices,
        "advice": advice(
            build,
            devices,
            problem=_problem,
            has_cpu=HAS_CPU,
            has_nodes=binaries.torch_abi(torch.__version__) in binaries.nodes_for(),
            lacking=_lacking,
        ),
    }


def _cuda_devices() -> list[dict[str, str]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
        }
        for index in range(torch.cuda.device_count())
    ]
