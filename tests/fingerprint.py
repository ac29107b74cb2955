"""Every bit that the CPU kernels give for the table of cases, to compare between configurations.

`python fingerprint.py FILE` writes them, and the instruction set that was used.
"""

from __future__ import annotations

import sys

import log_sum_cases
import numpy as np
import torch
from accuracy import gradients
from cases import DTYPES, LAYOUT_SHAPE, LAYOUTS, OPS, WEIGHTED

import fastvae
from fastvae import backend

# Wide and narrow rows, few and many, more than one thread's share of work each.
SHAPES = ((), (5,), (7, 19), (2, 30011), (9001, 3), (1, 40001), (40, 6, 10, 15))


def fingerprint() -> dict[str, np.ndarray]:
    bits = {}
    for op in OPS:
        for shape, param, dtype in (
            *((shape, "logvar", torch.float32) for shape in SHAPES),
            *(((33, 700), "logvar", dtype) for dtype in DTYPES),
            *(((3, 77), param, dtype) for param in op.forms for dtype in DTYPES),
        ):
            bits[f"{op.name} {shape} {param} {dtype}"] = _bits(op, op.inputs(shape, dtype, param))
        for name, layout in LAYOUTS.items():
            shape = (40, *LAYOUT_SHAPE[1:3], 21)
            tensors = [layout(t) if t.dim() == 4 else t for t in op.inputs(shape)]
            bits[f"{op.name} {name}"] = _bits(op, tensors)
    for op in WEIGHTED:
        for shape in SHAPES:
            bits[f"{op.name} {shape}"] = _bits(op, op.inputs(shape))
    for name, tensors in log_sum_cases.results():
        bits[name] = _joined(tensors)
    return bits


def _bits(op, tensors) -> np.ndarray:
    grads, _ = gradients(op, tensors)
    return _joined([*op(fastvae, tensors), *grads])


def _joined(results) -> np.ndarray:
    return np.concatenate([t.flatten().contiguous().view(torch.uint8).numpy() for t in results])


if __name__ == "__main__":
    np.savez(
        sys.argv[1],
        capability=np.array(backend.info()["cpu_capability"]),
        **{name.replace("/", "|"): bits for name, bits in fingerprint().items()},
    )
