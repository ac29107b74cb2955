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


def measure(
    base: Run, samples: list[Sample], roots: int, batch: int, per_example: int
) -> Likelihood | None:
    """None where no such tensors are found.

    Args:
        roots: the tensors that carry q's parameters, as bits.
        per_example: how many z an example has.
    """
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
    value, _ = chosen[0]
    elements = len(chosen) * most // (batch * per_example)
    if not elements:
        return None
    shape = tuple(value.tensor.shape)
    kept = list(shape[1:])
    while math.prod(kept) > elements and kept:
        kept.pop(0)
    if math.prod(kept) != elements:
        kept = [elements]
    weight = total / (batch * elements)
    error, factor = _error(base, path, value, z)
    name = _KNOWN.get(value.name, error and f"{error} error")
    if not error and value.name not in _KNOWN and factor != 1.0:
        name = "Gaussian density"
    elif not error and value.name not in _KNOWN and factor == 1.0:
        weight = abs(weight)
    line = value.line
    return Likelihood(
        name or "of a family unknown here", weight * factor, error, tuple(kept), line,
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


def _error(base: Run, path: list[Value], value: Value, z: int) -> tuple[str, float]:
    """Whether the elements are a squared or absolute error, and the factor to its weight.

    With the constants of a Gaussian's density, a (½ d² / sigma² + ½ ln 2 pi sigma²), they are no
    bare error, and the factor is a.
    """
    e = value.tensor.detach().flatten()
    for v in path:
        if v.name not in _DIFFERENCES or not value.of(1 << v.index) or len(v.inputs) != 2:
            continue
        if v.tensor.numel() != e.numel():
            continue
        operands = [base.trace.values[i] for i in v.inputs]
        if operands[0].of(z) == operands[1].of(z):
            continue
        a, b = (o.tensor.detach() for o in operands)
        d = (a + b if v.name == "add" else a - b).flatten()
        if d.numel() != e.numel():
            continue
        for name, power, factor in (("squared", d.square(), 2.0), ("absolute", d.abs(), 1.0)):
            slope, constant = _line_through(power, e)
            size = 1e-5 * e.abs().max().item()
            if (slope * power + constant - e).abs().max().item() > size or slope == 0:
                continue
            if name == "squared" and abs(constant) > size:
                density = _density(slope, constant)
                if density is not None:
                    return "", density
            return name, factor * slope
    return "", 1.0


_DIFFERENCES = {"sub", "rsub", "__rsub__", "sub_", "subtract", "add", "mse_loss", "l1_loss"}


def _line_through(x: Tensor, y: Tensor) -> tuple[float, float]:
    centred = x - x.mean()
    slope = (centred @ (y - y.mean()) / (centred @ centred)).item()
    return slope, (y.mean() - slope * x.mean()).item()


def _density(slope: float, constant: float) -> float | None:
    """a, if it is ±1, ±½ or ±2: slope = a / (2 sigma²), constant = ½ a ln 2 pi sigma²."""
    for a in (1.0, 2.0, 0.5):
        a = math.copysign(a, slope)
        variance = a / (2 * slope)
        if math.isclose(constant, 0.5 * a * math.log(2 * math.pi * variance), rel_tol=1e-4):
            return a
    return None
