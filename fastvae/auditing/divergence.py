"""What the loss charges for q(z | x): its dependence on mu and sigma with z held fixed.

The KL to any diagonal Gaussian prior N(mu_p, sigma_p^2), of weight w, has the derivatives

    dR/dmu = w (mu - mu_p) / sigma_p^2,      dR/dln sigma = w (sigma^2 / sigma_p^2 - 1)

and its estimate from samples, w ln q(z | x) at fixed z, has

    dR/dmu = w (z - mu) / sigma^2,           dR/dln sigma = w ((z - mu)^2 / sigma^2 - 1)

so that three values of sigma tell the power of sigma, which is 2 or -2, and w; and three of mu the
slope by mu, which must agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .latents import Carrier, Group, learned, rerun
from .runs import Program, Run
from .trace import Line, Recorder, Replacement

__all__ = ["Charge", "measure"]

STEP = 0.5


@dataclasses.dataclass
class Point:
    """The loss and its derivatives by mu and ln sigma, where these were moved."""

    loss: float
    by_mu: Tensor
    by_log_scale: Tensor
    scale: Tensor
    trace: Recorder


@dataclasses.dataclass
class Charge:
    """What was measured.

    Attributes:
        form: "closed", "samples", "none" (the loss does not depend on q), "detached" (it does, and
            has no gradient), "unknown".
        why: of an unknown one.
        power: of sigma.
        entropy: w, the weight of -ln sigma, one for all elements.
        square, mean: of sigma^2 / 2 and of mu^2 / 2; with a prior other than N(0, I), what they are
            relative to each other, times w.
        standard: whether the prior is N(0, I).
        nonlinear: whether the weight is another where the KL is large, as with free bits; the
            weights are those where it is large then.
        as_exponent: whether the KL takes the noise's scale s for ln sigma^2.
        reversed: whether it is KL(p || q).
        value: the KL as the loss has it, nats times its weight, if it can be told apart.
            line: where it is reduced; `reductions`: by what, and where.
    """

    form: str
    why: str = ""
    power: float = math.nan
    entropy: float = math.nan
    square: float = math.nan
    mean: float = math.nan
    standard: bool = False
    nonlinear: bool = False
    as_exponent: bool = False
    reversed: bool = False
    value: float | None = None
    line: Line | None = None
    reductions: Sequence[tuple[str, Line | None]] = ()

    @property
    def whole(self) -> bool:
        """A KL with all its terms: what else depends on q is something else, as weight decay is."""
        terms = (self.mean, self.square, self.entropy)
        equal = max(terms) - min(terms) <= 1e-2 * abs(self.entropy)
        return self.form in ("closed", "samples") and abs(abs(self.power) - 2) < 0.05 and equal


def measure(program: Program, base: Run, groups: list[Group]) -> list[Charge]:
    """The charge of each Gaussian."""
    passed = _passed_by(program, base, groups)
    charges = []
    for group, by_others in zip(groups, passed, strict=True):
        if group.problem:
            charges.append(Charge("unknown", group.problem))
        else:
            charge = _measure(program, base, group)
            if by_others and not charge.whole:
                why = "the loss depends on q by other tensors than mu and sigma"
                charge = Charge("unknown", why)
            charges.append(charge)
    return charges


def _passed_by(program: Program, base: Run, groups: list[Group]) -> list[bool]:
    """Whether the loss depends on an encoder's parameters by other ways than z, mu and sigma."""
    replace: dict[tuple[int, int], Replacement] = {}
    for group in groups:
        for value in (
            *(s.z for s in group.samples),
            *(c.value for c in (*group.mu, *group.scale)),
        ):
            assert value.key is not None
            replace[value.key] = _constant(value.tensor.detach().clone())
    run = rerun(program, base, replace=replace)
    found = []
    for group in groups:
        params = [run.trace.values[i].tensor for i in _parameters_of(base.trace, group)]
        grads: Sequence[Tensor | None] = ()
        if params and run.loss.requires_grad:
            grads = torch.autograd.grad(run.loss, params, retain_graph=True, allow_unused=True)
        found.append(any(g is not None and g.abs().max().item() > 1e-9 for g in grads))
    return found


def _measure(program: Program, base: Run, group: Group) -> Charge:
    here = _points(program, base, group)
    charge = _fit(here, group, program)
    if charge.form == "unknown" and group.first.z.tensor.numel() > group.mu[0].value.tensor.numel():
        charge = _by_weighted_samples(program, base, group, charge)
    if charge.form in ("none", "unknown") or charge.entropy <= 0:
        far = _fit(_points(program, base, group, away=6.0), group, program)
        if far.form in ("closed", "samples") and far.entropy > 0:
            charge = far
            charge.nonlinear = True
    if charge.form == "none":
        charge = _by_values(here, group)
    _find(group, base, charge)
    return charge


def _by_weighted_samples(program: Program, base: Run, group: Group, charge: Charge) -> Charge:
    """Samples whose weights depend on sigma, as importance weights do, and add up to one: where
    sigma is so large that every z is at q's mode, dR/dln sigma = -w."""
    sums = []
    for h in (6.0, 7.0):
        point = _point(program, base, group, 0.0, 0.0, h)
        sums.append(_uniform(-point.by_log_scale, 1e-2))
    if sums[0] and sums[1] and math.isclose(sums[0], sums[1], rel_tol=1e-2):
        w = sums[1]
        return Charge("samples", power=-2.0, entropy=w, square=w, mean=w)
    return charge


def _size(point: Point) -> float:
    return max(point.by_mu.abs().max().item(), point.by_log_scale.abs().max().item())


def _points(program: Program, base: Run, group: Group, away: float = 0.0) -> list[Point]:
    """At (mu, sigma), sigma smaller, sigma larger, mu smaller, mu larger."""
    moves = [(0.0, 0.0), (0.0, -STEP), (0.0, STEP), (-STEP, 0.0), (STEP, 0.0)]
    return [_point(program, base, group, away, m, h) for m, h in moves]


def _point(program: Program, base: Run, group: Group, away: float, shift: float, h: float) -> Point:
    leaves: dict[tuple[int, int], Tensor] = {}

    def mover(carrier: Carrier) -> Replacement:
        def move(t: Tensor) -> Tensor:
            if carrier.form.kind == "mean":
                moved = t + shift + away * torch.where(t < 0, -1.0, 1.0)
            else:
                moved = carrier.form.moved(t, h)
            assert carrier.value.key is not None
            leaf = leaves[carrier.value.key] = moved.detach().requires_grad_()
            return leaf.clone()

        return move

    replace: dict[tuple[int, int], Replacement] = {}
    for sample in group.samples:
        assert sample.z.key is not None
        replace[sample.z.key] = _constant(sample.z.tensor.detach().clone())
    for carrier in (*group.mu, *group.scale):
        assert carrier.value.key is not None
        replace[carrier.value.key] = mover(carrier)
    run = rerun(program, base, replace=replace)
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if run.loss.requires_grad:
        grads = torch.autograd.grad(run.loss, list(leaves.values()), allow_unused=True)
    by_key = dict(zip(leaves, grads, strict=True))
    by_mu = _total(group.mu, leaves, by_key)
    by_scale = _total(group.scale, leaves, by_key)
    first = group.scale[0]
    assert first.value.key is not None
    scale = first.form.scale(leaves[first.value.key].detach().flatten())
    return Point(run.loss.item(), by_mu, by_scale, scale, run.trace)


def _constant(t: Tensor) -> Replacement:
    """With a gradient, as what it takes the place of, that leads nowhere."""
    return lambda _: t.clone().requires_grad_()


def _total(
    carriers: list[Carrier],
    leaves: dict[tuple[int, int], Tensor],
    grads: dict[tuple[int, int], Tensor | None],
) -> Tensor:
    """The gradient by mu or ln sigma."""
    total = torch.zeros(())
    for c in carriers:
        assert c.value.key is not None
        leaf, grad = leaves[c.value.key].detach(), grads[c.value.key]
        found = torch.zeros_like(leaf) if grad is None else grad
        if c.form.kind != "mean":
            found = found / c.form.slope(leaf)
        total = total.to(found) + found.flatten()
    return total


def _parameters_of(trace: Recorder, group: Group) -> list[int]:
    """The encoder's parameters: what mu and sigma are computed from."""
    ancestors = 0
    for c in (*group.mu, *group.scale):
        ancestors |= c.value.ancestors
    bits = learned(trace) & ancestors
    return [v.index for v in trace.values if v.key is None and bits >> v.index & 1]


# ---- Fits ----------------------------------------------------------------------------------------


def _uniform(t: Tensor, tolerance: float) -> float | None:
    """The number that all elements are, or None."""
    t = t[torch.isfinite(t)]
    if not t.numel():
        return None
    middle = t.median().item()
    spread = (t - middle).abs().max().item()
    return middle if spread <= tolerance * max(abs(middle), 1e-12) else None


def _fit(points: list[Point], group: Group, program: Program) -> Charge:
    tolerance = 1e-3 if program.exact else 3e-2
    here, smaller, larger, left, right = points
    size = max(_size(p) for p in points)
    if not math.isfinite(size):
        return Charge("unknown", "the loss is not finite")
    if size < 1e-12:
        return Charge("none")
    g = [p.by_log_scale for p in (smaller, here, larger)]
    s = [p.scale for p in (smaller, here, larger)]
    slope = (right.by_mu - left.by_mu) / (2 * STEP)
    straight = ((right.by_mu + left.by_mu) / 2 - here.by_mu).abs().max().item() < tolerance * size
    charge = Charge("unknown", "what it charges for q is no Gaussian KL")
    if not straight:
        return charge
    negative = bool((s[1] < 0).any())
    if negative or group.scale[0].form.kind == "std":
        # Does the loss take s for ln sigma^2?  dR/ds = w/2 (e^s - 1)
        by_s = [gi / si for gi, si in zip(g, s, strict=True)]
        weight = 2 * (by_s[2] - by_s[0]) / (s[2].exp() - s[0].exp())
        w = _uniform(weight, 10 * tolerance)
        if w is not None and torch.allclose(
            by_s[1], 0.5 * w * (s[1].exp() - 1), rtol=10 * tolerance, atol=tolerance * abs(w)
        ):
            charge = Charge("closed", power=math.nan, entropy=w, square=w, as_exponent=True)
            charge.mean = slope.median().item()
            charge.standard = True
            return charge
        if negative:
            return charge
    change = (g[2] - g[0]).abs().max().item()
    if change < tolerance * size:  # sigma^2 is not in it
        entropy = _uniform(-g[1], tolerance)
        mean = _uniform(slope, tolerance)
        if mean == 0 and entropy and entropy > 0:  # ln q(z | x) = -½ eps² - ln sigma
            return Charge("samples", power=-2.0, entropy=entropy, square=entropy, mean=entropy)
        if mean is None or (entropy is None and g[1].abs().max().item() > tolerance * size):
            return charge
        return Charge("closed", power=0.0, entropy=entropy or 0.0, square=0.0, mean=mean,
                      standard=True)  # fmt: skip
    ratio = (g[2] - g[1]) / (g[1] - g[0])
    usable = (ratio > 0) & ((g[2] - g[1]).abs() > 1e-9 * size)
    if not bool(usable.any()):
        return charge
    powers = ratio[usable].log() / STEP
    power = powers.median().item()
    if (powers - power).abs().median().item() > 0.05:
        return charge
    factor = (g[2] - g[0]) / (s[2] ** power - s[0] ** power)
    entropies = factor * s[1] ** power - g[1]
    entropy = _uniform(entropies, 10 * tolerance)
    if entropy is None:
        return charge
    # At fixed z the slope by mu is -w / sigma^2; of KL(p || q) it is w / sigma^2, and 0 at mu = 0.
    if power < -1e-2 and _uniform(slope * s[1] ** -power, 0.1) is not None:
        if (here.by_mu - slope * _mu(here, group)).abs().max().item() < 10 * tolerance * size:
            w = -entropy
            return Charge("closed", power=power, entropy=w, square=w, mean=w, reversed=True)
        return Charge("samples", power=power, entropy=entropy, square=entropy, mean=entropy)
    # With a confused sigma the slope by mu is still that of the true prior.
    relative = slope / factor
    mean, square = _uniform(slope, 10 * tolerance), _uniform(factor, 10 * tolerance)
    centre = here.by_mu - slope * _mu(here, group)
    standard = (
        mean is not None
        and square is not None
        and centre.abs().max().item() < 10 * tolerance * size
    )
    if not standard:
        ratio_mean = _uniform(relative, 0.05)
        if ratio_mean is None:
            return charge
        mean, square = ratio_mean * entropy, entropy
    assert mean is not None
    assert square is not None
    return Charge(
        "closed", power=power, entropy=entropy, square=square, mean=mean, standard=standard
    )


def _mu(point: Point, group: Group) -> Tensor:
    return point.trace.values[group.mu[0].value.index].tensor.detach().flatten()


def _by_values(points: list[Point], group: Group) -> Charge:
    """Where there is no gradient: whether the loss depends on q all the same."""
    losses = torch.tensor([p.loss for p in points], dtype=torch.float64)
    changes = losses[1:] - losses[0]
    if changes.abs().max().item() <= 1e-9 * (1 + losses.abs().max().item()):
        return Charge("none")
    closed, by_samples, by_noise = [], [], []
    for p in points:
        mu, scale = _mu(p, group).double(), p.scale.double()
        closed.append(0.5 * (mu**2 + scale**2 - 1 - 2 * scale.log()).sum())
        z = torch.stack([s.z.tensor.detach().flatten() for s in group.samples]).double()
        if z.shape[1] % mu.numel():
            return Charge("unknown", "its gradient does not reach q")
        z = z.reshape(-1, mu.numel())
        log_q = -0.5 * ((z - mu) / scale) ** 2 - scale.log()
        by_samples.append(log_q.mean(0).sum())
        by_noise.append(-scale.log().sum())  # ln q(z | x) = -½ eps² - ln sigma
    for form, values in (("detached", closed), ("samples", by_samples), ("samples", by_noise)):
        want = torch.stack(values)[1:] - values[0]
        weight = (want @ changes / (want @ want)).item()
        if (changes - weight * want).abs().max().item() < 1e-3 * changes.abs().max().item():
            return Charge(form, power=2.0 if form == "detached" else -2.0, entropy=weight,
                          square=weight, mean=weight)  # fmt: skip
    return Charge("unknown", "its gradient does not reach q, as with doubly reparameterized ones")


# ---- The KL in the trace -------------------------------------------------------------------------


def _find(group: Group, base: Run, charge: Charge) -> None:
    """The line where the loss has its KL, how it is reduced, and its value."""
    roots, drawn, before = 0, 0, 0
    for c in (*group.mu, *group.scale):
        roots |= 1 << c.value.index
    for d in base.trace.draws:
        drawn |= 1 << d.value
    for sample in group.samples:
        before |= sample.z.ancestors
    loss = base.trace.find(base.loss)
    if loss is None:
        return
    reductions: list[tuple[str, Line | None]] = []
    ends: list[int] = []
    for v in base.trace.values:
        if not loss.of(1 << v.index) or not v.of(roots) or v is loss or before >> v.index & 1:
            continue
        of_noise = v.of(drawn)
        if charge.form in ("closed", "detached") and of_noise:
            continue
        inputs = [base.trace.values[i] for i in v.inputs]
        sizes = [t.tensor.numel() for t in inputs if t.of(roots)]
        if v.key and sizes and v.tensor.numel() < max(sizes) and v.name not in _SLICES:
            reductions.append((v.name, v.line))
            charge.line = charge.line or v.line
        users = [u for u in base.trace.values if v.index in u.inputs and loss.of(1 << u.index)]
        if users and all(u.of(drawn) or u is loss for u in users):
            ends.append(v.index)
    charge.reductions = reductions
    if charge.form == "closed" and ends:
        charge.line = charge.line or base.trace.values[ends[0]].line
        tensors = [base.trace.values[i].tensor for i in ends]
        if all(t.requires_grad for t in tensors) and not any(
            base.trace.values[i].stale for i in ends
        ):
            grads = torch.autograd.grad(base.loss, tensors, retain_graph=True, allow_unused=True)
            charge.value = sum(
                (g * t.detach()).sum().item()
                for g, t in zip(grads, tensors, strict=True)
                if g is not None
            )


_SLICES = {"chunk", "split", "__getitem__", "unbind", "select", "narrow", "tensor_split"}
