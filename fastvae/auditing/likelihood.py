"""What the loss charges for -ln p(x | z).

Its elements are those tensors, made of both z and x, whose every element has the same weight in the
loss. How heavy they are together tells what the loss makes of one: 1 where elements are summed and
1 / P where they are averaged over P. Only errors, squared or absolute, may have any weight, which
is that of a Gaussian's or Laplace's scale.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .latents import Sample
from .runs import Run
from .trace import Line, Value

__all__ = ["Likelihood", "measure"]

_KNOWN = {
    "binary_cross_entropy": "Bernoulli",
    "binary_cross_entropy_with_logits": "Bernoulli",
    "cross_entropy": "categorical",
    "nll_loss": "categorical",
    "poisson_nll_loss": "Poisson",
    "gaussian_nll_loss": "Gaussian with its own sigma",
}


@dataclasses.dataclass
class Likelihood:
    """What was measured.

    Attributes:
        name: of the family, if it is known.
        weight: of one element of one example (the mean over samples); negative where the sign is
            wrong. Of half the squared error, if `error` is "squared".
        error: "squared" or "absolute" where the elements are bare errors, else "".
        shape: of the elements of one example.
        elements: how many these are.
        line: where they are made; and where they are reduced.
    """

    name: str
    weight: float
    error: str
    shape: tuple[int, ...]
    line: Line | None
    values: list[Value]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def measure(base: Run, samples: list[Sample], roots: int, batch: int) -> Likelihood | None:
    """None where no such tensors are found."""
    trace = base.trace
    loss = trace.find(base.loss)
    z = 0
    for s in samples:
        z |= 1 << s.z.index
    if loss is None or not z or not base.loss.requires_grad:
        return None
    of_data = _reached(base, trace.given, roots)
    path = [
        v
        for v in trace.values
        if v.of(z)
        and of_data >> v.index & 1
        and loss.of(1 << v.index)
        and not v.stale
        and v.tensor.requires_grad
    ]
    if not path:
        return None
    grads = torch.autograd.grad(
        base.loss, [v.tensor for v in path], retain_graph=True, allow_unused=True
    )
    uniform: list[tuple[Value, Tensor]] = []
    for v, g in zip(path, grads, strict=True):
        if g is not None and v.tensor.numel() % batch == 0 and _uniform(g, batch):
            uniform.append((v, g))
    if not uniform:
        return None
    most = max(v.tensor.numel() for v, _ in uniform)
    uniform = [(v, g) for v, g in uniform if v.tensor.numel() == most]
    chosen = [pair for pair in uniform if pair[0].name in _KNOWN] or [
        (v, g) for v, g in uniform if not any(o is not v and o.of(1 << v.index) for o, _ in uniform)
    ]
    total = sum(g.sum().item() for _, g in chosen)
    samples_each = _samples(samples, base, batch)
    value, _ = chosen[0]
    elements = len(chosen) * most // (batch * samples_each)
    if not elements:
        return None
    shape = tuple(value.tensor.shape)
    kept = [n for n in shape[1:]]
    while math.prod(kept) > elements and kept:
        kept.pop(0)
    if math.prod(kept) != elements:
        kept = [elements]
    weight = total / (batch * elements)
    error, factor = _error(base, path, value)
    name = _KNOWN.get(value.name, error and f"{error} error")
    if name == "Bernoulli" and weight < 0:
        factor = 1.0  # its sign is known
    elif not error and value.name not in _KNOWN:
        weight = abs(weight)
    line = value.line
    return Likelihood(
        name or "of an unknown family", weight * factor, error, tuple(kept), line,
        [v for v, _ in chosen],
    )  # fmt: skip


def _reached(base: Run, sources: int, roots: int) -> int:
    """What is computed from the sources by another way than through q's parameters."""
    reached = sources
    for v in base.trace.values:
        if not roots >> v.index & 1 and any(reached >> i & 1 for i in v.inputs):
            reached |= 1 << v.index
    return reached


def _uniform(g: Tensor, batch: int) -> bool:
    """One weight for all elements of a row, or of an example; zero for those that are masked."""
    g = g.detach()
    tolerance = 1e-6 if g.dtype == torch.float64 else 1e-3
    if not bool(torch.isfinite(g).all()) or not bool((g != 0).any()):
        return False
    for lead in (0, 1, 2):
        if lead > g.dim() or (lead == 2 and g.dim() < 3):
            break
        rows = g.reshape(*g.shape[:lead], -1)
        top = rows.abs().amax(-1, keepdim=True)
        signed = rows.sum(-1, keepdim=True).sign() * top
        same = ((rows - signed).abs() <= tolerance * top) | (rows == 0)
        if bool(same.all()) and (lead == 0 or rows.shape[-1] > 1):
            return True
    return False


def _samples(samples: list[Sample], base: Run, batch: int) -> int:
    """How many z an example has."""
    first = samples[0].z.tensor
    same = [s for s in samples if s.z.tensor.shape == first.shape]
    if first.shape[0] == batch:
        inside = 1
    elif first.dim() > 1 and first.shape[1] == batch:
        inside = first.shape[0]
    else:
        inside = max(first.shape[0] // batch, 1)
    return inside * len(same)


def _error(base: Run, path: list[Value], value: Value) -> tuple[str, float]:
    """Whether the elements are a squared or absolute error, and the factor to its weight."""
    e = value.tensor.detach()
    trace = base.trace
    ancestors = [v for v in path if value.of(1 << v.index) and v is not value]
    differences = [v.tensor.detach() for v in ancestors if v.tensor.shape == e.shape]
    if value.name in ("mse_loss", "l1_loss") and len(value.inputs) == 2:
        a, b = (trace.values[i].tensor.detach() for i in value.inputs)
        differences = [a - b]
    for d in differences:
        for name, power, factor in (("squared", d.square(), 2.0), ("absolute", d.abs(), 1.0)):
            usable = power > 1e-6 * power.max()
            k = (e[usable] / power[usable]).median()
            if bool(torch.allclose(k * power, e, rtol=1e-4, atol=1e-6 * e.abs().max().item())):
                return name, factor * k.item()
    return "", 1.0


