"""What the weights of KL and likelihood say: which of them is averaged, halved or doubled.

With the loss's normalization nu, 1 / B for a mean over the batch and 1 for a sum, the KL should
weigh beta nu and the likelihood nu, or both the same multiple. Where they do not, the ratio is
looked for among those of known mistakes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from .likelihood import Likelihood

__all__ = ["Cause", "Verdict", "judge"]


@dataclasses.dataclass(frozen=True)
class Cause:
    """A mistake that multiplies a weight."""

    kind: str
    factor: float
    says: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`causes` is empty if all is well; `effective_beta` None if it is not known."""

    causes: tuple[Cause, ...]
    effective_beta: float | None


_RIGHT = Cause("", 1.0, "")


def judge(
    weight: float,
    likelihood: Likelihood | None,
    *,
    batch: int,
    beta: float,
    latent: Sequence[int],
    samples: int,
    tolerance: float,
) -> Verdict:
    """Of the weight of a KL.

    Args:
        weight: of the KL in the loss.
        latent: the shape of one example's z.
        samples: of z for each example.
    """

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * abs(b)

    norms = (1.0 / batch, 1.0)
    of_kl = list(_kl_causes(latent, batch))
    if likelihood is None:
        if any(near(weight, beta * nu) for nu in norms):
            return Verdict((), None)
        for nu, cause in itertools.product(norms, of_kl):
            if near(weight, beta * nu * cause.factor) and cause.kind != "kl-batch":
                return Verdict((cause,), beta * cause.factor)
        return Verdict((), None)
    own = likelihood.weight
    of_nll = list(_likelihood_causes(likelihood, samples))
    units = (2.0, 1.0) if likelihood.error == "squared" else (1.0,)
    if any(near(weight, beta * own / unit) for unit in units):
        return Verdict((), beta)
    if likelihood.error and own > 0:
        suspicious = [c.factor for c in of_nll] + [float(batch), 1.0 / batch]
        for nu in norms:
            if near(weight, beta * nu) and not any(
                near(own, nu * unit * f) for unit in units for f in suspicious
            ):
                return Verdict((), beta)
    for number in (1, 2):  # causes: the simplest explanation first
        for nu, unit in itertools.product(norms, units):
            for a, b in itertools.product([_RIGHT, *of_kl], [_RIGHT, *of_nll]):
                causes = tuple(c for c in (a, b) if c is not _RIGHT)
                if len(causes) != number:
                    continue
                free = likelihood.error and own > 0 and b is _RIGHT and a.kind != "kl-batch"
                if near(weight, beta * nu * a.factor) and (
                    free or near(own, nu * unit * b.factor)
                ):
                    return Verdict(causes, beta * a.factor / b.factor)
    if likelihood.error:
        effective = min((weight / nu for nu in norms), key=lambda b: abs(math.log(abs(b / beta))))
    else:
        effective = weight / own
    says = (
        f"The KL has the weight {effective:.4g} where it should have {beta:g}; give beta="
        f"{effective:.4g} if that is meant."
    )
    return Verdict((Cause("kl-weight", effective / beta, says),), effective)


def _subsets(shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """All dimensions first, then fewer; with the number of elements."""
    dims = range(len(shape))
    for n in range(len(shape), 0, -1):
        for chosen in itertools.combinations(dims, n):
            size = math.prod(shape[d] for d in chosen)
            if size > 1:
                yield tuple(d + 1 for d in chosen), size


def _kl_causes(latent: Sequence[int], batch: int) -> Iterator[Cause]:
    for dims, size in _subsets(latent):
        if len(dims) == len(latent):
            says = f"The KL is averaged over the {size} dimensions of z instead of summed"
            kind = "kl-averaged"
        else:
            named = ", ".join(map(str, dims))
            says = (
                f"The KL is not summed over dimension {named} of z, shape [B, "
                f"{', '.join(map(str, latent))}], and so averaged over its {size} elements"
            )
            kind = "kl-dimensions"
        yield Cause(kind, 1 / size, f"{says}: it weighs 1/{size} of what it should.")
    yield Cause("kl-half-missing", 2.0, "The KL is twice what it should be: its ½ is missing.")
    yield Cause("kl-halved", 0.5, "The KL is half of what it should be.")
    yield Cause(
        "kl-batch", 1 / batch,
        f"The KL is averaged over the batch where the likelihood is summed: with {batch} examples "
        f"it weighs 1/{batch} of what it should.",
    )  # fmt: skip
    yield Cause(
        "kl-batch", float(batch),
        f"The KL is summed over the batch where the likelihood is averaged: with {batch} examples "
        f"it weighs {batch} times what it should.",
    )  # fmt: skip


def _likelihood_causes(likelihood: Likelihood, samples: int) -> Iterator[Cause]:
    shape = likelihood.shape
    for dims, size in _subsets(shape):
        over = "" if len(dims) == len(shape) else f" of dimension {', '.join(map(str, dims))}"
        says = (
            f"The likelihood is averaged over {size} elements{over} of x instead of summed: the KL "
            f"weighs {size} times what it should beside it."
        )
        yield Cause("likelihood-averaged", 1 / size, says)
    if samples > 1:
        says = f"The likelihood is summed over {samples} samples of z instead of averaged."
        yield Cause("likelihood-samples", float(samples), says)
    if not likelihood.error or likelihood.weight < 0:
        yield Cause("likelihood-sign", -1.0, "The likelihood has the wrong sign: the loss rewards errors.")
