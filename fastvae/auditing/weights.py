"""What the weights of KL and likelihood say: which of them is averaged, halved or doubled.

With the loss's normalization nu, 1 / B for a mean over the batch and 1 for a sum, the KL should
weigh beta nu and the likelihood nu, or both the same multiple. Where they do not, the ratio is
looked for among those of known mistakes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from .likelihood import Likelihood

__all__ = ["Cause", "Verdict", "Weights", "judge"]


@dataclasses.dataclass(frozen=True)
class Cause:
    """A mistake that multiplies a weight; `grows`: by a number that is another in other batches."""

    kind: str
    factor: float
    says: str
    grows: bool = False


@dataclasses.dataclass(frozen=True)
class Weights:
    """What was measured with a batch of some size.

    Attributes:
        kl: the weight of the KL.
        likelihood: None if it was not found.
        batch, samples: the number of examples, and of z for each.
        latent: the shape of one example's z.
    """

    kl: float
    likelihood: Likelihood | None
    batch: int
    samples: int
    latent: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`causes` is empty if all is well; `effective_beta` None if it is not known.

    `by_mean`: the explanation has the loss as a mean over the batch.
    """

    causes: tuple[Cause, ...]
    effective_beta: float | None
    by_mean: bool = False

    def same_as(self, other: Verdict) -> bool:
        kinds = [tuple((c.kind, c.grows) for c in v.causes) for v in (self, other)]
        factors = [[c.factor for c in v.causes if not c.grows] for v in (self, other)]
        return kinds[0] == kinds[1] and factors[0] == factors[1] and self.by_mean == other.by_mean


_RIGHT = Cause("", 1.0, "")


def judge(
    here: Weights, elsewhere: Callable[[], Weights | None], beta: float, tolerance: float
) -> Verdict:
    """The simplest explanation.

    Args:
        here: what was measured.
        elsewhere: measures it with another number of examples, by which 1 / B is told from any
            other number. It is asked only if all is not well.
    """
    found = list(_explanations(here, beta, tolerance))
    if found and not found[0].causes:
        return found[0]
    second = elsewhere()
    if second is not None:
        others = list(_explanations(second, beta, tolerance))
        found = [v for v in found if any(v.same_as(o) for o in others)]
    if found:
        return found[0]
    return _unexplained(here, second, beta)


def _unexplained(here: Weights, second: Weights | None, beta: float) -> Verdict:
    if here.likelihood is None:
        return Verdict((), None)
    if here.likelihood.error:
        mean = second is not None and abs(second.kl / here.kl - 1) > 1e-2
        effective = here.kl * (here.batch if mean or second is None else 1)
    else:
        effective = here.kl / here.likelihood.weight
    says = (
        f"The KL has the weight {effective:.4g} where it should have {beta:g}; give beta="
        f"{effective:.4g} if that is meant."
    )
    return Verdict((Cause("kl-weight", effective / beta, says),), effective)


def _explanations(measured: Weights, beta: float, tolerance: float) -> Iterator[Verdict]:
    """Those that fit, the simplest first."""
    weight, likelihood, batch = measured.kl, measured.likelihood, measured.batch

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * abs(b)

    norms = (1.0 / batch, 1.0)
    of_kl = list(_kl_causes(measured.latent, batch))
    if likelihood is None:
        for a, nu in itertools.product([_RIGHT, *of_kl], norms):
            if near(weight, beta * nu * a.factor) and not a.grows:
                causes: tuple[Cause, ...] = () if a is _RIGHT else (a,)
                yield Verdict(causes, beta * a.factor if causes else None, nu < 1)
        return
    own = likelihood.weight
    of_nll = list(_likelihood_causes(likelihood, measured.samples))
    units = (2.0, 1.0) if likelihood.error == "squared" else (1.0,)
    if any(near(weight, beta * own / unit) for unit in units):
        yield Verdict((), beta)
        return
    averages = [
        a * b
        for a in (1.0, *(c.factor for c in of_nll))
        for b in (1.0, float(batch), 1.0 / batch)
        if a * b != 1.0
    ]

    def is_scale(nu: float) -> bool:
        """Whether the weight may be that of a Gaussian's or Laplace's scale."""
        means = (nu * unit * factor for unit in units for factor in averages)
        return bool(likelihood.error) and own > 0 and not any(near(own, m) for m in means)

    for nu in norms:
        if near(weight, beta * nu) and is_scale(nu):
            yield Verdict((), beta)
            return
    for number in (1, 2):
        for a, b in itertools.product([_RIGHT, *of_kl], [_RIGHT, *of_nll]):
            causes = tuple(c for c in (a, b) if c is not _RIGHT)
            if len(causes) != number:
                continue
            for nu, unit in itertools.product(norms, units):
                if near(weight, beta * nu * a.factor) and (
                    (b is _RIGHT and not a.grows and is_scale(nu))
                    or near(own, nu * unit * b.factor)
                ):
                    yield Verdict(causes, beta * a.factor / b.factor, nu < 1)


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
            named = f"dimension{'s' * (len(dims) > 1)} {', '.join(map(str, dims))}"
            says = (
                f"The KL is not summed over {named} of z, shape [B, "
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
        grows=True,
    )  # fmt: skip
    yield Cause(
        "kl-batch", float(batch),
        f"The KL is summed over the batch where the likelihood is averaged: with {batch} examples "
        f"it weighs {batch} times what it should.",
        grows=True,
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
        yield Cause(
            "likelihood-sign", -1.0, "The likelihood has the wrong sign: the loss rewards errors."
        )
