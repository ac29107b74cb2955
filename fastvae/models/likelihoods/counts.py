"""Likelihoods of counts: Poisson, negative binomial, and that with extra zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from .base import Likelihood, check_positive

__all__ = ["NegativeBinomial", "Poisson", "ZeroInflatedNegativeBinomial"]

_DISPERSIONS = ("gene", "cell", "group")


class _Counts(Likelihood):
    """What they share: a mean for each element of x, from the decoder's first output f.

    Without `library` it is e^f. With `library="observed"` it is l softmax(f), over all elements of
    an example, where l is the sum of x: the decoder then says how an example's counts are shared
    out, not how many there are. `mean` and `sample` take `library`, [B], as a keyword, and without
    it `library_size`.
    """

    library_size: Tensor

    low, whole = 0.0, True

    def __init__(self, library: str | None = None, library_size: float = 1e4) -> None:
        super().__init__()
        if library not in (None, "observed"):
            raise ValueError(f"library is {library!r}; want None or 'observed'")
        self.library = library
        self.register_buffer(
            "library_size", torch.tensor(check_positive("library_size", library_size))
        )

    def context(self, condition: Any, x: Tensor | None = None) -> dict[str, Any]:
        if self.library is None or x is None:
            return {}
        return {"library": _totals(x)}

    def _log_rate(self, f: Tensor, context: dict[str, Any], ndim: int) -> Tensor:
        """ln of the mean; `ndim` is x's number of dimensions."""
        if self.library is None:
            return f
        l: Tensor = context.get("library", self.library_size)  # noqa: E741
        shares = f.flatten(1 - ndim).log_softmax(-1).unflatten(-1, f.shape[f.dim() - ndim + 1 :])
        return shares + torch.log(l).reshape(*l.shape, *(1,) * (ndim - 1)).to(shares.dtype)

    def _log_rate_of(self, x: Tensor, f: Tensor, context: dict[str, Any]) -> Tensor:
        return self._log_rate(f, self.context(None, x) | context, x.dim())

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        rate = torch.exp(self._log_rate(parts[0], context, parts[0].dim()))
        return rate.to(parts[0].dtype)


class Poisson(_Counts):
    """x ~ Poisson(m); see `fastvae.poisson_log_prob`.

    Args:
        library: None, where m = e^f of the decoder's output f; or "observed", where it is the sum
            of an example's x, times softmax(f).
        library_size: stands for that sum where there is no x, such as in samples.

    Raises:
        ValueError: an argument out of range.
    """

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        log_rate = self._log_rate_of(x, parts[0], context)
        return ops.poisson_log_prob(x, log_rate, param="log_rate", event_ndim=x.dim() - 1)

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return _poisson(eps[0], torch.exp(self._log_rate(parts[0], context, parts[0].dim())))


class NegativeBinomial(_Counts):
    """x ~ NB(m, theta), of mean m and variance m + m^2 / theta; see
    `fastvae.negative_binomial_log_prob`.

    Args:
        features: of x: their number, or their shape.
        dispersion: whose theta is: "gene", a parameter for each feature; "cell", given by the
            decoder for each element, whose second output is its logarithm; or "group", a parameter
            for each feature and group, whose index [B] is the model's condition, or its "group"
            where that is a mapping.
        groups: their number.
        theta: at first, where it is a parameter.
        library, library_size: as in `Poisson`.

    Raises:
        ValueError: an argument out of range.
    """

    draws = 1 + 2 * 6 + 1  # Poisson's, attempts at the gamma variable, and its boost
    has_extra_zeros = False

    def __init__(
        self,
        features: int | Sequence[int] | None = None,
        *,
        dispersion: str = "gene",
        groups: int | None = None,
        theta: float = 1.0,
        library: str | None = None,
        library_size: float = 1e4,
    ) -> None:
        super().__init__(library, library_size)
        if dispersion not in _DISPERSIONS:
            raise ValueError(
                f"dispersion is {dispersion!r}; want one of {', '.join(map(repr, _DISPERSIONS))}"
            )
        if (dispersion == "group") != (groups is not None):
            raise ValueError(
                f"groups is {groups} with dispersion={dispersion!r}; want both or none"
            )
        if (dispersion == "cell") != (features is None):
            raise ValueError(
                f"features is {features} with dispersion={dispersion!r}; want the number of "
                "features, and none where the decoder gives theta"
            )
        self.dispersion = dispersion
        self.outputs = 1 + (dispersion == "cell") + self.has_extra_zeros
        if features is not None:
            shape = [features] if isinstance(features, int) else [*features]
            shape = shape if groups is None else [groups, *shape]
            log_theta = math.log(check_positive("theta", theta))
            self.log_theta = nn.Parameter(torch.full(shape, log_theta))

    def context(self, condition: Any, x: Tensor | None = None) -> dict[str, Any]:
        found = super().context(condition, x)
        if self.dispersion == "group" and condition is not None:
            found["group"] = condition if isinstance(condition, Tensor) else condition["group"]
        return found

    def _log_theta(self, parts: tuple[Tensor, ...], context: dict[str, Any]) -> Tensor:
        if self.dispersion == "cell":
            return parts[1]
        if self.dispersion == "gene":
            return self.log_theta
        group = context.get("group")
        if not isinstance(group, Tensor) or group.is_floating_point():
            raise ValueError(f"group is {group!r}; want the examples' indices, an integer tensor")
        return self.log_theta[group.long()]

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        log_rate = self._log_rate_of(x, parts[0], context)
        log_theta = self._log_theta(parts, context)
        ndim = x.dim() - 1
        if not self.has_extra_zeros:
            return ops.negative_binomial_log_prob(
                x, log_rate, log_theta, param="log", event_ndim=ndim
            )
        return ops.zero_inflated_negative_binomial_log_prob(
            x, log_rate, log_theta, parts[-1], param="log", event_ndim=ndim
        )

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        rate = torch.exp(self._log_rate(parts[0], context, parts[0].dim()))
        theta = torch.exp(self._log_theta(parts, context).double()).expand_as(rate)
        return _poisson(eps[0], rate * _gamma(eps[1:14], theta) / theta)


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """x is 0 with probability s(l), l the decoder's last output, and else ~ NB(m, theta); see
    `fastvae.zero_inflated_negative_binomial_log_prob`.

    Args:
        features, dispersion, groups, theta, library, library_size: as in `NegativeBinomial`. With
            `library="observed"` m is l softmax(f) too: the extra zeros come off it.

    Raises:
        ValueError: an argument out of range.
    """

    draws = NegativeBinomial.draws + 1
    has_extra_zeros = True

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        return super()._mean(*parts, **context) * torch.sigmoid(-parts[-1])

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        extra = torch.special.ndtr(eps[-1]) < torch.sigmoid(parts[-1])
        return torch.where(extra, 0, super()._sample(eps[:-1], *parts, **context))


def _totals(x: Tensor) -> Tensor:
    """The sum of each example's counts."""
    return x.flatten(1).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))


# ---- Samples from normals ------------------------------------------------------------------------
# In float64, by what comes from a seed alone, so that it is the same on every device.


def _poisson(eps: Tensor, rate: Tensor) -> Tensor:
    """The smallest k whose distribution function is at least Phi(eps): exact, by bisection."""
    u = torch.special.ndtr(eps)
    # The normal approximation, by Cornish and Fisher's first correction, is off by few.
    guess = rate + rate.sqrt() * eps + (eps * eps - 1) / 6
    width = 4.0
    while True:
        low = (guess - width).floor().clamp(min=-1)
        high = (guess + width).ceil().clamp(min=0)
        # P(X <= k) is the regularized upper incomplete gamma function of k + 1.
        below = (low < 0) | (torch.special.gammaincc(low.clamp(min=0) + 1, rate) < u)
        above = torch.special.gammaincc(high + 1, rate) >= u
        finite = rate.isfinite() & (u < 1)
        if ((below & above) | ~finite).all():
            break
        width *= 4
    while ((high - low > 1) & finite).any():
        middle = ((low + high) / 2).floor()
        enough = torch.special.gammaincc(middle.clamp(min=0) + 1, rate) >= u
        enough = enough & (middle >= 0)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(finite, high, rate)


def _gamma(eps: Tensor, shape: Tensor) -> Tensor:
    """Gamma(shape, 1) by Marsaglia & Tsang 2000, "A simple method for generating gamma variables".

    Each attempt takes a normal and a uniform number and fails with a probability of at most 1/20,
    so that six of them fail together once in 10^8; the mode is taken then.
    """
    boosted = shape < 1
    d = torch.where(boosted, shape + 1, shape) - 1 / 3
    c = 1 / torch.sqrt(9 * d)
    value, missing = d, torch.ones_like(d, dtype=torch.bool)
    for normal, other in zip(eps[:6], eps[6:12], strict=True):
        v = (1 + c * normal) ** 3
        bound = 0.5 * normal * normal + d - d * v + d * torch.log(v.clamp(min=1e-300))
        accepted = (v > 0) & (torch.special.log_ndtr(other) < bound)
        value = torch.where(missing & accepted, d * v, value)
        missing = missing & ~accepted
    boost = torch.exp(torch.special.log_ndtr(eps[12]) / torch.where(boosted, shape, 1))
    return torch.where(boosted, value * boost, value)
