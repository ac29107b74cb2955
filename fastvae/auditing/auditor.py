"""`fastvae.audit`: what it asks, and in which order."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import divergence, faults, flow, likelihood
from .divergence import Charge
from .latents import FORMS, MOST, Carrier, Group, find_groups, find_samples
from .report import Audit, Finding, Latent
from .runs import Program, Run
from .trace import Line, UnsteadyError
from .weights import Weights

__all__ = ["audit"]


def audit(
    model: nn.Module,
    x: Any,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    *,
    beta: float = 1.0,
    examples: int = 7,
) -> Audit:
    """Runs a VAE in plain PyTorch, or of any other kind, and says what is wrong with its ELBO.

    For q(z | x) = N(mu, diag(sigma^2)) the loss of an example should be

        beta KL(q(z | x) || p(z)) - ln p(x | z),    z = mu + sigma eps,  eps ~ N(0, I)

    in nats, summed over all dimensions of z and of x, summed or averaged over the batch. The model
    is run some dozens of times on a few examples, with its noise, mu, sigma and z replaced by
    others, and what that does to the loss and its gradients is compared with this formula. A copy
    of the model is run, in training mode and, where it allows that, in float64.

    Args:
        model: a module whose `forward(x)` returns the loss; or a tuple that begins with it, a
            mapping that has it under "loss", or an object with an attribute `loss`. It is averaged
            if it is one value for each example.
        x: a batch: a tensor whose first dimension is the batch, or a tuple or dict of such.
        loss: called with model and x, in place of `model(x)`; returns the same.
        beta: the weight that the KL is meant to have.
        examples: how many of the batch are used; all, if the model takes no other number.

    Returns:
        The faults found, each with its line, what was measured and of what; see `Audit`. What could
        not be checked stands in its `notes`. `print` shows all.

    Raises:
        TypeError: there is no loss, or the model cannot be copied.
        ValueError: x has fewer than two examples, or tensors of different lengths.

    Example:
        >>> report = fastvae.audit(model, x)
        >>> assert report.ok, report
    """
    program = Program(model, x, loss, examples)
    try:
        result = _audit(program, model, loss, beta)
        if result is None:
            program.jitter()  # what starts at zero hides what it does
            result = _audit(program, model, loss, beta, again=True)
    except UnsteadyError as error:
        return Audit([], [], "", [f"anything: {error}"], None)
    assert result is not None
    return result


def _audit(
    program: Program,
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Any] | None,
    beta: float,
    again: bool = False,
) -> Audit | None:
    """None if something is hidden, the first time."""
    base = program.run()
    other = program.run(seed=1)
    if not math.isfinite(base.loss.item()):
        return Audit([faults.not_finite(base)], [], "unknown", [], None)
    samples = find_samples(program, base)
    if not samples:
        if not again and base.trace.draws:
            return None
        return _without_noise(program, base, other, _defined(model, loss))
    groups = find_groups(program, base, samples)
    hidden = any(g.problem and s.diagonal for g in groups for s in g.samples)
    if not again and (hidden or not all(s.used for s in samples)):
        return None
    charged, nll = _measured(program, base, groups)

    findings: list[Finding] = []
    kept = [g for g, _ in charged]
    notes = [
        f"the noise at {g.first.z.line}: {g.problem}"
        for g in groups
        if g not in kept and g.problem and g.first.scale.std() > 1e-6 * g.first.scale.abs().max()
    ]
    for group, _ in charged:
        findings += faults.of_noise(base, other, group, program.batch)
        findings += faults.of_range(base, group)
        findings += flow.faults(program, base, group)
    effective = None
    if beta != 0:
        for k, (group, charge) in enumerate(charged):
            again_with_fewer = functools.partial(_elsewhere, program, k, len(charged))
            found, b = faults.of_charge(base, group, charge, nll, program, beta, again_with_fewer)
            findings += found
            effective = b if effective is None else effective
            if charge.form == "unknown":
                notes.append(f"the KL of z at {group.first.z.line}: {charge.why}")
        findings += [faults.no_kl(g) for g, c in charged if c.form == "none" and g.first.used]
    if nll is None:
        notes.append("the likelihood: no tensor of elements with one weight was found")
    if len(base.trace.draws) > MOST:
        notes.append(f"draws of noise after the {MOST}th")
    latents = [_latent(g, c, program.batch) for g, c in charged]
    return Audit(_once(findings), latents, _said(nll, program.batch), notes, effective)


def _measured(
    program: Program, base: Run, groups: list[Group]
) -> tuple[list[tuple[Group, Charge]], likelihood.Likelihood | None]:
    """The Gaussians that the loss charges for, all if it does for none, and the likelihood."""
    charges = divergence.measure(program, base, groups)
    pairs = list(zip(groups, charges, strict=True))
    charged = [(g, c) for g, c in pairs if not _is_other_noise(g, c)] or pairs
    roots = 0
    for g, _ in charged:
        for c in (*g.mu, *g.scale):
            roots |= 1 << c.value.index
    own = [s for g, _ in charged for s in g.samples]
    per_example = max(
        (g.per_example(program.batch) for g, _ in charged if g.mu),
        default=charged[0][0].per_example(program.batch) if charged else 1,
    )
    return charged, likelihood.measure(base, own, roots, program.batch, per_example)


def _elsewhere(program: Program, k: int, n: int) -> Weights | None:
    """The weights of the k-th of n Gaussians with fewer examples."""
    fewer = program.smaller()
    if fewer is None:
        return None
    base = fewer.run()
    charged, nll = _measured(fewer, base, find_groups(fewer, base, find_samples(fewer, base)))
    if len(charged) != n or charged[k][1].form not in ("closed", "samples"):
        return None
    return faults.weights_of(*charged[k], nll, fewer.batch)


def _is_other_noise(group: Group, charge: Charge) -> bool:
    """Noise whose scale is not learned, as in hidden layers; what the loss does not see."""
    unseen = charge.form == "none" and not group.first.used
    return unseen or (group.first.diagonal and not group.scale)


def _without_noise(program: Program, base: Run, other: Run, line: Line | None) -> Audit:
    """Nothing was drawn that becomes a z."""
    if not math.isclose(base.loss.item(), other.loss.item(), rel_tol=1e-9):
        note = "anything: the loss depends on noise that is not PyTorch's, or no Gaussian's"
        return Audit([], [], "unknown", [note], None)
    return Audit([faults.no_noise(program, line)], [], "unknown", [], None)


def _defined(model: nn.Module, loss: Callable[[nn.Module, Any], Any] | None) -> Line | None:
    """Where the model is written."""
    for function in (getattr(type(model), "forward", None), loss):
        try:
            code = inspect.unwrap(function).__code__  # type: ignore[arg-type]
        except (AttributeError, TypeError):
            continue
        if not code.co_filename.startswith(torch.__path__[0]):
            return Line(code.co_filename, code.co_firstlineno)
    return None


def _once(findings: list[Finding]) -> list[Finding]:
    return list({(f.kind, f.file, f.line): f for f in reversed(findings)}.values())[::-1]


def _latent(group: Group, charge: Charge, batch: int) -> Latent:
    line = group.first.z.line
    kl = {
        "closed": "closed form" + ", not linear" * charge.nonlinear,
        "samples": "by samples",
        "none": "none",
        "detached": "detached",
        "unknown": f"not checked: {charge.why}",
    }[charge.form]
    prior = ("N(0, I)" if charge.standard else "a Gaussian") if charge.form == "closed" else ""
    weight = faults.weight(charge) if charge.form in ("closed", "samples") else None
    if weight is not None:
        weight *= group.copies(batch)
    if weight is not None and faults.is_mean(weight, batch):
        weight *= batch
    return Latent(
        tuple(group.first.z.tensor.shape),
        line.file if line else None,
        line.number if line else None,
        _name(group.scale[0]) if group.scale else "",
        kl,
        prior,
        weight,
    )


def _name(carrier: Carrier) -> str:
    for name, form in FORMS.items():
        if form == carrier.form:
            return name
    return {"log": "a logarithm", "std": "a multiple", "var": "a square"}[carrier.form.kind]


def _said(nll: likelihood.Likelihood | None, batch: int) -> str:
    if nll is None:
        return "not found"
    mean = faults.is_mean(nll.weight, batch)
    weight = nll.weight * batch if mean else nll.weight
    unit = "½ (x - f)²" if nll.error == "squared" else "an element"
    over = "averaged over the batch" if mean else "summed over the batch"
    return (
        f"{nll.name}, {nll.elements} elements at {nll.line}, {over}; weight of {unit} {weight:.4g}"
    )
