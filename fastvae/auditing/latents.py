"""Where z = mu + sigma * eps is made, and from what.

What a draw becomes is found by running the program with the draw's numbers at 0 and at 1: z is the
first of its descendants that is not zero without noise; mu is z without noise, sigma the
difference. The tensors that carry mu and sigma, such as an encoder's logvar, are found by their
values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .runs import Program, Run
from .trace import Draw, Recorder, UnsteadyError, Value

__all__ = [
    "FORMS",
    "MOST",
    "Carrier",
    "Form",
    "Group",
    "Sample",
    "find_groups",
    "find_samples",
    "learned",
    "rerun",
]

MOST = 64  # draws that are looked at


@dataclasses.dataclass(eq=False)
class Sample:
    """z = mean + scale * noise.

    Attributes:
        diagonal: whether every element of z has one number of the draw's.
        used: whether the loss depends on the noise.
    """

    draw: Draw
    z: Value
    mean: Tensor
    scale: Tensor
    diagonal: bool
    used: bool

    @property
    def noise(self) -> Tensor:
        return (self.z.tensor.detach() - self.mean) / self.scale


@dataclasses.dataclass(frozen=True)
class Form:
    """How a tensor t makes the scale: "log": ln s = factor t + offset; "std": s = ...; "var":
    s^2 = ... ."""

    kind: str
    factor: float = 1.0
    offset: float = 0.0

    def scale(self, t: Tensor) -> Tensor:
        y = self.factor * t + self.offset
        return y.exp() if self.kind == "log" else y if self.kind == "std" else y.abs().sqrt()

    def slope(self, t: Tensor) -> Tensor:
        """d ln s / dt"""
        y = self.factor * t + self.offset
        return {
            "log": torch.full_like(t, self.factor),
            "std": self.factor / y,
            "var": 0.5 * self.factor / y,
        }[self.kind]

    def moved(self, t: Tensor, h: float) -> Tensor:
        """What makes e^h times the scale."""
        if self.kind == "log":
            return t + h / self.factor
        power = 1 if self.kind == "std" else 2
        y = (self.factor * t + self.offset) * math.exp(power * h)
        return (y - self.offset) / self.factor


FORMS = {
    "logvar": Form("log", 0.5),
    "log_std": Form("log"),
    "std": Form("std"),
    "var": Form("var"),
}


@dataclasses.dataclass(eq=False)
class Carrier:
    """A tensor that mu or sigma is made of."""

    value: Value
    form: Form


@dataclasses.dataclass(eq=False)
class Group:
    """Samples of one Gaussian, and the tensors that carry its parameters."""

    samples: list[Sample]
    mu: list[Carrier]
    scale: list[Carrier]
    problem: str = ""

    @property
    def first(self) -> Sample:
        return self.samples[0]

    def per_example(self, batch: int) -> int:
        """How many z an example has."""
        z = self.first.z.tensor
        if not self.mu:
            return len(self.samples) * max(z.shape[0] // batch, 1)
        mu = self.mu[0].value.tensor
        return len(self.samples) * (z.numel() // mu.numel()) * self.copies(batch)

    def copies(self, batch: int) -> int:
        """How often an example went through the encoder."""
        return max(self.mu[0].value.tensor.shape[0] // batch, 1) if self.mu else 1

    def event(self, batch: int) -> tuple[int, ...]:
        """The shape of one z."""
        z = self.first.z.tensor
        size = len(self.samples) * z.numel() // (batch * self.per_example(batch))
        shape = list(z.shape[1:])
        while len(shape) > 1 and math.prod(shape) > size:
            shape.pop(0)
        return tuple(shape) or (1,)


def learned(trace: Recorder) -> int:
    """The parameters, as bits."""
    bits = 0
    for v in trace.values:
        if v.key is None and v.tensor.requires_grad and v.tensor.is_leaf:
            bits |= 1 << v.index
    return bits


def rerun(
    program: Program,
    base: Run,
    *,
    noise: dict[int, float] | None = None,
    replace: dict[tuple[int, int], Callable[[Tensor], Tensor]] | None = None,
) -> Run:
    """The base run once more: with some draws' numbers all the same, some results replaced.

    Raises:
        UnsteadyError: other functions were called.
    """
    numbers = [
        torch.full_like(d.noise, noise[k]) if noise and k in noise else d.noise
        for k, d in enumerate(base.trace.draws)
    ]
    run = program.run(noise=numbers, replace=replace)
    if [v.name for v in run.trace.values] != [v.name for v in base.trace.values]:
        raise UnsteadyError("two runs of the same batch and noise call different functions")
    return run


# ---- From noise to z -----------------------------------------------------------------------------


def find_samples(program: Program, base: Run) -> list[Sample]:
    """The draws that something learned is added to."""
    samples = []
    parameters = learned(base.trace)
    for k, draw in enumerate(base.trace.draws[:MOST]):
        found = list(base.trace.descendants(1 << draw.value))
        if not any(v.of(parameters) for v in found):
            continue
        runs = [rerun(program, base, noise={k: value}) for value in (0.0, 1.0)]
        zero, one = (run.trace for run in runs)
        losses = [run.loss.item() for run in (base, *runs)]
        used = max(losses) - min(losses) > 1e-9 * max(map(abs, losses))
        for v in found:
            if v.stale or not v.tensor.is_floating_point() or not v.tensor.numel():
                continue
            mean = zero.values[v.index].tensor.detach()
            if not bool((mean != 0).any()):
                continue
            if not v.of(parameters):  # noise on what the model is given
                break
            scale = one.values[v.index].tensor.detach() - mean
            if bool((scale != 0).any()) and v.tensor.numel() >= draw.noise.numel():
                kind = _diagonal(v.tensor.detach(), mean, scale, draw.noise)
                if kind is not None:
                    samples.append(Sample(draw, v, mean, scale, kind, used))
            break
    return samples


def _diagonal(z: Tensor, mean: Tensor, scale: Tensor, noise: Tensor) -> bool | None:
    """None if z is not linear in the noise at all."""
    if not bool(torch.isfinite(scale).all()):
        return None
    n = ((z - mean) / scale).flatten()
    want = noise.flatten().to(n)
    if bool((scale == 0).any()):
        return False
    tolerance = 1e-5 if z.dtype == torch.float64 else 1e-2
    sorted_n, _ = torch.sort(n)
    if n.numel() % want.numel():
        return False
    sorted_want, _ = torch.sort(want.repeat(n.numel() // want.numel()))
    return bool(torch.allclose(sorted_n, sorted_want, rtol=tolerance, atol=tolerance))


# ---- From z to what it is made of ----------------------------------------------------------------


def find_groups(program: Program, base: Run, samples: list[Sample]) -> list[Group]:
    """Samples by what they are made of."""
    groups: dict[object, Group] = {}
    for sample in samples:
        group = _carried(program, base, sample) if sample.diagonal else Group([sample], [], [])
        if not sample.diagonal:
            group.problem = "its covariance is not diagonal"
        roots = (*(c.value.index for c in group.mu), *(c.value.index for c in group.scale))
        key = roots if not group.problem else sample
        if key in groups:
            groups[key].samples.append(sample)
        else:
            groups[key] = group
    return list(groups.values())


def _carried(program: Program, base: Run, sample: Sample) -> Group:
    group = Group([sample], [], [])
    forms = _views(sample, program.batch)
    tolerance = 1e-5 if program.exact else 1e-3
    drawn = 1 << sample.draw.value
    means: list[Carrier] = []
    scales: list[Carrier] = []
    for v in base.trace.values:
        if v.key is None or v.stale or v.of(drawn) or not v.tensor.is_floating_point():
            continue
        for mean, scale in forms:
            t = v.tensor.detach()
            if t.numel() != mean.numel() or t.numel() < 2:
                continue
            t = t.flatten().to(mean)
            if torch.allclose(t, mean, rtol=tolerance, atol=tolerance * 1e-2):
                means.append(Carrier(v, Form("mean")))
            elif (form := _form(t, scale, tolerance)) is not None:
                scales.append(Carrier(v, form))
            break
    while means or scales:
        group.mu, group.scale = _roots(means), _roots(scales)
        if not group.mu:
            group.problem = "no tensor that is mu was found"
            return group
        if not group.scale:
            group.problem = "no tensor that sigma is made of was found"
            return group
        wrong = [c for c in group.scale if not _makes_scale(program, base, sample, c, group.scale)]
        if not wrong:
            return group
        scales = [c for c in scales if c not in wrong]
    group.problem = "no tensors that are mu and sigma were found"
    return group


def _views(sample: Sample, batch: int) -> list[tuple[Tensor, Tensor]]:
    """mean and scale, flat: as they are, and once where several samples have the same."""
    mean, scale = sample.mean, sample.scale
    found = [(mean.flatten(), scale.flatten())]

    def repeated(first: Callable[[Tensor], Tensor]) -> None:
        small = [first(t) for t in (mean, scale)]
        if all(
            torch.allclose(s.expand_as(t) if s.dim() == t.dim() else s, t, rtol=1e-6)
            for s, t in zip(small, (mean, scale), strict=True)
        ):
            found.append((small[0].flatten(), small[1].flatten()))

    if (
        mean.dim() > 1
        and mean.shape[0] > 1
        and (mean.shape[0] != batch or batch in mean.shape[1:2])
    ):
        repeated(lambda t: t[:1])
    if mean.dim() > 2 and mean.shape[0] == batch and mean.shape[1] > 1:
        repeated(lambda t: t[:, :1])
    rows = mean.shape[0] if mean.dim() else 0
    if rows > batch and rows % batch == 0:
        for by_sample in (True, False):
            shape = (rows // batch, batch) if by_sample else (batch, rows // batch)
            pair = [t.unflatten(0, shape) for t in (mean, scale)]
            small = [t.select(0 if by_sample else 1, 0) for t in pair]
            if all(
                torch.allclose(s.unsqueeze(0 if by_sample else 1).expand_as(t), t, rtol=1e-6)
                for s, t in zip(small, pair, strict=True)
            ):
                found.append((small[0].flatten(), small[1].flatten()))
    return found


def _form(t: Tensor, scale: Tensor, tolerance: float) -> Form | None:
    positive = bool((scale > 0).all())
    log = scale.abs().log()
    targets = {"log": log, "std": scale, "var": scale.square()}
    for form in FORMS.values():
        want = targets[form.kind]
        near = form.factor * t + form.offset
        if torch.allclose(near, want, rtol=tolerance, atol=tolerance) and (
            positive or form.kind != "log"
        ):
            return form
    spread = t - t.mean()
    if not bool(spread.abs().max() > 1e-6 * (1 + t.abs().max())):
        return None
    for kind, want in targets.items():
        factor = ((want - want.mean()) * spread).sum() / spread.square().sum()
        offset = want.mean() - factor * t.mean()
        extent = (want.max() - want.min()).item()
        residual = (factor * t + offset - want).abs().max().item()
        if extent > 1e-6 and residual < 2e-3 * extent and factor.abs() > 1e-6:
            return Form(kind, factor.item(), offset.item())
    return None


def _roots(carriers: list[Carrier]) -> list[Carrier]:
    """Those that are not made of others."""
    bits = [1 << c.value.index for c in carriers]
    everyone = 0
    for bit in bits:
        everyone |= bit
    return [c for c, bit in zip(carriers, bits, strict=True) if not c.value.of(everyone & ~bit)]


def _makes_scale(
    program: Program, base: Run, sample: Sample, carrier: Carrier, roots: list[Carrier]
) -> bool:
    """Whether z's scale follows when the carriers are changed."""
    if not sample.z.of(1 << carrier.value.index):
        return True  # computed anew elsewhere
    k = base.trace.draws.index(sample.draw)
    h = 0.5
    replace = {}
    for c in roots:
        assert c.value.key is not None
        replace[c.value.key] = _mover(c.form, h)
    runs = [rerun(program, base, noise={k: e}, replace=replace).trace for e in (0.0, 1.0)]
    low, high = (r.values[sample.z.index].tensor.detach() for r in runs)
    got, want = high - low, sample.scale * math.exp(h)
    return bool(torch.allclose(got, want, rtol=2e-2))


def _mover(form: Form, h: float) -> Callable[[Tensor], Tensor]:
    return lambda t: form.moved(t, h)
