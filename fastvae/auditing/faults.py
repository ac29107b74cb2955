"""From what was measured to what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from . import weights
from .divergence import Charge
from .latents import Group, Sample
from .likelihood import Likelihood
from .report import Finding
from .runs import Program, Run
from .trace import Line

__all__ = [
    "is_mean",
    "no_kl",
    "no_noise",
    "of_charge",
    "of_noise",
    "of_range",
    "weight",
    "weights_of",
]

# What a term of the KL may weigh beside the others by mistake. Other numbers come from other terms
# in mu or sigma, such as a penalty.
_MISTAKES = (0.0, 0.25, 0.5, 2.0, 4.0, -0.5, -1.0, -2.0)
LARGEST = math.log(65504.0)  # whose exp is float16's largest number


def weight(charge: Charge) -> float:
    """Of the KL, whatever it takes sigma for: of its terms, that which most have."""
    if charge.as_exponent or charge.reversed:
        return charge.entropy
    power = abs(charge.power) if charge.form == "samples" else charge.power
    if abs(power) < 1e-2 or charge.form == "detached":
        return charge.mean if charge.mean else charge.entropy
    entropy, square = (2 * t / power for t in (charge.entropy, charge.square))
    if abs(abs(power) - 2) < 0.05 and power > 0:
        return sorted((entropy, square, charge.mean))[1]
    # Where sigma is confused, the slope by mu is still that of N(0, I).
    return charge.mean if charge.standard and charge.mean else entropy


def is_mean(w: float, batch: int) -> bool:
    """Whether a weight is more likely one of a mean over the batch than of a sum."""
    return abs(w) < 1 / math.sqrt(batch)


def not_finite(base: Run) -> Finding:
    """Where the first infinity, or NaN, is made."""
    for v in base.trace.values:
        t = v.tensor.detach()
        if v.key is not None and t.is_floating_point() and not bool(torch.isfinite(t).all()):
            says = f"The loss is {base.loss.item()}; {v.name} is the first that is not finite."
            return Finding.at(v.line, "not-finite", says, base.loss.item(), "bound")
    return Finding.at(None, "not-finite", "The loss is not finite.", base.loss.item(), "bound")


# ---- Noise ---------------------------------------------------------------------------------------


def no_noise(program: Program, line: Line | None) -> Finding:
    program.model.eval()
    try:
        in_evaluation = bool(program.run().trace.draws)
    except Exception:  # whatever the user's program raises
        in_evaluation = False
    finally:
        program.model.train()
    says = (
        "In training mode the loss is the same for every seed: the decoder is given mu, or noise "
        "that never changes."
    )
    if in_evaluation:
        says += " In evaluation mode noise is drawn: the condition is the wrong way round."
    return Finding.at(line, "no-noise", says, 0.0, "sampling")


def of_noise(base: Run, other: Run, group: Group, batch: int) -> Iterator[Finding]:
    for sample in group.samples:
        draw = sample.draw
        k = base.trace.draws.index(draw)
        if not sample.used:
            line = _decoder_line(base, group) or sample.z.line
            says = (
                "z is made and the loss does not depend on its noise: the decoder is given mu in "
                "training."
            )
            yield Finding.at(line, "decoder-given-mu", says, 0.0, "sampling")
        again = other.trace.draws[k] if k < len(other.trace.draws) else None
        if (
            again is not None
            and again.noise.shape == draw.noise.shape
            and torch.equal(again.noise, draw.noise)
        ):
            says = "The noise is the same in every run: its seed is set anew each time."
            yield Finding.at(draw.line, "noise-not-fresh", says, 0.0, "sampling")
        if not draw.normal:
            mean = draw.noise.mean().item()
            says = (
                f"The noise is uniform on [0, 1), with mean {mean:.2f}, instead of standard normal."
            )
            yield Finding.at(draw.line, "noise-not-normal", says, mean, "sampling")
        if sample.diagonal and _shared(sample, batch):
            says = (
                f"All {batch} examples have the same noise: it is drawn without the batch's "
                "dimension."
            )
            yield Finding.at(draw.line, "noise-shared", says, float(batch), "sampling")


def _shared(sample: Sample, batch: int) -> bool:
    noise = sample.noise
    for dim in range(min(2, noise.dim())):
        if noise.shape[dim] == batch:
            first = noise.select(dim, 0).unsqueeze(dim).expand_as(noise)
            return noise.shape[dim] > 1 and bool(torch.allclose(noise, first, rtol=1e-4, atol=1e-4))
    return False


def _decoder_line(base: Run, group: Group) -> Line | None:
    """Where mu meets something learned on its way to the loss."""
    loss = base.trace.find(base.loss)
    for v in base.trace.values:
        inputs = [base.trace.values[i] for i in v.inputs]
        of_mu = any(u.of(1 << c.value.index) for u in inputs for c in group.mu)
        meets = any(u.key is None and u.tensor.requires_grad for u in inputs)
        if of_mu and meets and loss is not None and loss.of(1 << v.index):
            return v.line
    return None


def of_range(base: Run, group: Group) -> Iterator[Finding]:
    """e^logvar in half precision."""
    top = max(2 * s.scale.abs().max().log().item() for s in group.samples)
    if math.isfinite(top) and top > LARGEST:
        line = group.first.z.line
        for v in base.trace.values:
            if v.name.startswith("exp") and any(v.of(1 << c.value.index) for c in group.scale):
                line = v.line
                break
        says = (
            f"logvar reaches {top:.1f}, and e^logvar exceeds float16's largest number above "
            f"{LARGEST:.2f}: it is infinite in half precision."
        )
        yield Finding.at(line, "logvar-overflow", says, top, "bound")


# ---- The KL --------------------------------------------------------------------------------------


def no_kl(group: Group) -> Finding:
    says = "The loss does not depend on mu and sigma but through z: it has no KL."
    return Finding.at(group.first.z.line, "kl-missing", says, 0.0, "kl")


def weights_of(
    group: Group, charge: Charge, likelihood: Likelihood | None, batch: int
) -> weights.Weights:
    latent, samples = group.event(batch), group.per_example(batch)
    w = abs(weight(charge)) * group.copies(batch)
    return weights.Weights(w, likelihood, batch, samples, latent)


def of_charge(
    base: Run,
    group: Group,
    charge: Charge,
    likelihood: Likelihood | None,
    program: Program,
    beta: float,
    elsewhere: Callable[[], weights.Weights | None],
) -> tuple[list[Finding], float | None]:
    """The faults of a KL, and the effective beta."""
    line = charge.line or group.first.z.line
    if charge.form == "detached":
        says = "The KL has no gradient: it is computed from detached tensors."
        return [Finding.at(line, "kl-detached", says, 0.0, "kl")], None
    if charge.form not in ("closed", "samples"):
        return [], None
    tolerance = 5e-3 if program.exact else 5e-2
    findings = [*_confusions(group, charge, line, tolerance)]
    w = weight(charge)
    if w < 0:
        says = (
            f"The KL has the wrong sign: its weight in the loss is {w:.4g}, so that it is "
            "maximized."
        )
        findings.append(Finding.at(line, "kl-sign", says, -1.0, "kl"))
    if not findings:
        findings += _value(group, charge, abs(w), line, program)
    measured_here = weights_of(group, charge, likelihood, program.batch)
    verdict = weights.judge(measured_here, elsewhere, beta, tolerance)
    for cause in verdict.causes:
        of_likelihood = cause.kind.startswith("likelihood")
        where = line
        if of_likelihood and likelihood is not None:
            where = _reduction_of(base, likelihood) or likelihood.line
        elif cause.kind in ("kl-averaged", "kl-batch"):
            means = [at for name, at in charge.reductions if name == "mean"]
            where = (means[0] if means else None) or line
        measured = verdict.effective_beta
        says = cause.says
        if measured is not None and cause.kind != "kl-weight":
            says = f"{says} The effective beta is {measured:.4g}."
        findings.append(
            Finding.at(where, cause.kind, says, measured, "nll" if of_likelihood else "loss")
        )
    return findings, verdict.effective_beta


def _reduction_of(base: Run, likelihood: Likelihood) -> Line | None:
    """Where the likelihood's elements are first averaged."""
    elements = 0
    for v in likelihood.values:
        elements |= 1 << v.index
    for v in base.trace.values:
        if v.of(elements) and v.name == "mean":
            return v.line
    return None


def _confusions(
    group: Group, charge: Charge, line: Line | None, tolerance: float
) -> Iterator[Finding]:
    """Where sampling and KL take sigma for different things, or the KL's terms do not fit."""
    if charge.as_exponent:
        low = min(s.scale.min().item() for s in group.samples)
        says = (
            "The noise is multiplied by what the KL takes for ln sigma² (its least value is "
            f"{low:.3g}): logvar is used as sigma."
        )
        yield Finding.at(_scale_line(group), "logvar-as-sigma", says, low, "sampling")
        return
    if charge.reversed:
        says = "The KL is KL(p || q) and should be KL(q || p): its arguments are exchanged."
        yield Finding.at(line, "kl-reversed", says, charge.power, "kl")
        return
    expected = 2.0 if charge.form == "closed" else -2.0
    power, w = charge.power, weight(charge)
    if charge.form == "closed" and abs(power) < 1e-2:
        what = "sigma²" if charge.entropy else "sigma"
        says = (
            f"The KL's term in {what} is missing: the loss does not depend on it with z held fixed."
        )
        yield Finding.at(line, "kl-terms", says, 0.0, "kl")
        return
    if abs(power - expected) > 0.1:
        factor = power / expected
        says = (
            "The noise is scaled by s, and the KL is that of the standard deviation "
            f"s^{factor:.3g}. "
        )
        if abs(factor - 0.5) < 0.02:
            says += (
                "Either sigma² stands where sigma belongs, as exp(logvar) for exp(0.5 * logvar), "
            )
            says += "or the KL takes ln sigma for ln sigma²."
        elif factor < 0:
            says += "The exponent of one of them has the wrong sign."
        else:
            says += "One of them takes sigma for sigma², or sigma² for its square."
        yield Finding.at(_scale_line(group), "sigma-confused", says, factor, "sampling")
        return
    if charge.form == "samples":
        return
    # A scale that is not what the KL takes it for: the root of sigma^2's weight beside mu^2's.
    ratio = charge.square / charge.mean if charge.mean else math.inf
    form, draw = group.scale[0].form, group.first.draw
    scaled = isinstance(draw.std, float | int) and abs(draw.std - 1) > 1e-6
    multiple = {"log": form.offset != 0, "std": form.factor != 1, "var": form.factor != 1}
    if ratio > 0 and abs(ratio - 1) > 2 * tolerance and (scaled or multiple[form.kind]):
        factor = ratio**-0.5
        says = f"The noise is {factor:.4g} times as large as the KL's sigma."
        where = draw.line if scaled else _scale_line(group)
        yield Finding.at(where, "noise-scale", says, factor, "sampling")
        return
    terms = (charge.mean, charge.square, charge.entropy)
    odd = max(terms, key=lambda t: abs(t - w)) / w
    if any(abs(odd - known) < 0.02 for known in _MISTAKES):
        names = ("mu²", "sigma²", "-ln sigma²")
        said = ", ".join(f"{t / w:.3g} for {n}" for t, n in zip(terms, names, strict=True))
        says = (
            f"The terms of the KL should have one weight; relative to each other they have {said}."
        )
        yield Finding.at(line, "kl-terms", says, odd, "kl")


def _scale_line(group: Group) -> Line | None:
    """Where the noise is scaled: sampling, if it is in one line; else where sigma is made."""
    return group.first.z.line


def _value(
    group: Group, charge: Charge, w: float, line: Line | None, program: Program
) -> Iterator[Finding]:
    """Constants that the KL should have."""
    if max(abs(t - w) for t in (charge.mean, charge.square, charge.entropy)) > 1e-2 * w:
        return
    if charge.value is None or charge.nonlinear or not charge.standard or charge.form != "closed":
        return
    first = group.first
    mean, scale = first.mean, first.scale
    n = group.mu[0].value.tensor.numel()
    share = n / mean.numel()
    true = share * 0.5 * (mean**2 + scale**2 - 1 - 2 * scale.abs().log()).sum().item()
    offset = charge.value / w - true
    per_element = offset / n
    if abs(per_element) < (1e-3 if program.exact else 1e-2):
        return
    kl = charge.value / w / program.batch
    if kl < 0:
        says = (
            f"The KL is negative, {kl:.4g} nats for an example where it is "
            f"{true / program.batch:.4g}."
        )
        yield Finding.at(line, "kl-negative", says, kl, "kl")
    else:
        says = (
            f"The KL is {kl:.4g} nats for an example where it is {true / program.batch:.4g}: it is "
            f"off by {per_element:.3g} in each dimension of z."
        )
        yield Finding.at(line, "kl-offset", says, per_element, "kl")
