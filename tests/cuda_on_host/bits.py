"""Every bit that the kernels give for a small table of cases, to compare between builds of them.

`python bits.py FILE` writes them. Names that begin with "each" are of results whose elements are
computed one by one: all devices and grids agree on them. Others are sums, which every device adds
up in an order of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import log_sum_cases
from accuracy import upstream_like
from cases import DTYPES, LAYOUT_SHAPE, LAYOUTS, OPS, WEIGHTED, Op

import fastvae

# One piece of several segments, rows of one and of several units, many rows, rows of one element.
SHAPES = ((), (5,), (70,), (7, 19), (2, 9001), (600, 3), (300, 1), (2, 3, 70, 61))


def bits() -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for op in OPS:
        for dtype in DTYPES:
            for shape in SHAPES:
                _add(found, op, op.inputs(shape, dtype), f"{shape} {dtype}")
            for param in op.forms:
                _add(found, op, op.inputs((33, 70), dtype, param), f"{param} {dtype}", param)
            for name, layout in LAYOUTS.items():
                plain = op.inputs(LAYOUT_SHAPE, dtype)
                tensors = [layout(t) if t.shape == LAYOUT_SHAPE else t for t in plain]
                _add(found, op, tensors, f"{name} {dtype}")
        for shape in ((70,), (33, 70), (5, 3)):
            seeds = torch.arange(shape[0]) * 3**30
            if op.draws:
                _add(found, op, op.inputs(shape), f"{shape}, a seed a row", seed=seeds)
    for op in WEIGHTED:
        for shape in SHAPES:
            _add(found, op, op.inputs(shape), f"{shape}")
    for name, results in log_sum_cases.results():
        for k, t in enumerate(results):
            drawn = name.startswith("sample") and k == 0  # by sums that are exact
            _put(found, drawn, f"{name} {k}", t)
    return found


def _add(
    found: dict[str, np.ndarray],
    op: Op,
    tensors: list[Tensor],
    case: str,
    param: str = "logvar",
    **seed: Tensor,
) -> None:
    full = torch.broadcast_shapes(*(t.shape for t in tensors))
    for event_ndim in (None, 0) if op.sums else (None,):
        leaves = [t.detach().requires_grad_() for t in tensors]
        results = op(fastvae, leaves, param, event_ndim=event_ndim, **seed)
        grads = torch.autograd.grad(results, leaves, upstream_like([y.detach() for y in results]))
        rows_are_elements = event_ndim == 0 or len(full) < 2
        for k, y in enumerate(results):
            is_z = op.draws and k == 0
            _put(found, is_z or rows_are_elements, f"{op.name} {case} {event_ndim} result {k}", y)
        for k, g in enumerate(grads):
            summed = g.shape != full or "sample_shape" in op.options
            _put(found, not summed, f"{op.name} {case} {event_ndim} gradient {k}", g)


def _put(found: dict[str, np.ndarray], each: bool, name: str, t: Tensor) -> None:
    t = torch.where(t.isnan(), torch.nan, t.detach()).contiguous()  # all NaNs are one
    found[f"{'each' if each else 'sum'} {name}"] = t.view(-1).view(torch.uint8).numpy()


if __name__ == "__main__":
    np.savez(sys.argv[1], **{name.replace("/", "|"): b for name, b in bits().items()})
