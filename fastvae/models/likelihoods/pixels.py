"""Likelihoods of other kinds of pixels: binary, in [0, 1], with outliers, or one of some levels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.arguments import check_levels
from ...ops.pixels import continuous_bernoulli_mean
from .base import Likelihood, check_positive

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Laplace",
]


class Bernoulli(Likelihood):
    """x is 1 with probability s(l), l the decoder's output; see `fastvae.bernoulli_log_prob`."""

    low, high = 0.0, 1.0

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return ops.bernoulli_log_prob(x, parts[0], event_ndim=x.dim() - 1)

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        return torch.sigmoid(parts[0])

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return (_logistic(eps[0]) < parts[0]).double()


class ContinuousBernoulli(Likelihood):
    """x in [0, 1] with a density proportional to e^{x l}, l the decoder's output; see
    `fastvae.continuous_bernoulli_log_prob`."""

    low, high = 0.0, 1.0

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return ops.continuous_bernoulli_log_prob(x, parts[0], event_ndim=x.dim() - 1)

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        return continuous_bernoulli_mean(parts[0])

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        # The inverse of (e^{x l} - 1) / (e^l - 1); for l > 0 that of 1 - x: it cannot overflow.
        rate = -parts[0].abs()
        u = torch.special.ndtr(eps[0])
        small = rate > -1e-6
        x = torch.where(small, u, torch.log1p(u * torch.expm1(rate)) / torch.where(small, -1, rate))
        return torch.where(parts[0] > 0, 1 - x, x)


class Laplace(Likelihood):
    """Laplace(f(z), b): absolute instead of squared errors.

    Args:
        scale: b, above 0; the initial value where it is learned.
        learned: make ln b a parameter, one for all pixels.

    Raises:
        ValueError: `scale` out of range.
    """

    def __init__(self, scale: float = 1.0, *, learned: bool = False) -> None:
        super().__init__()
        log_scale = torch.tensor(math.log(check_positive("scale", scale)))
        self.log_scale = nn.Parameter(log_scale, requires_grad=learned)

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return ops.laplace_log_prob(x, parts[0], self.log_scale.to(x.dtype), event_ndim=x.dim() - 1)

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        return parts[0]

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        # -ln of twice the smaller tail is the distance from the median in units of b.
        distance = -math.log(2) - torch.special.log_ndtr(-eps[0].abs())
        return parts[0] + torch.exp(self.log_scale) * eps[0].sign() * distance


class _Levels(Likelihood):
    """Values that are one of `bins` levels from `low` to `high`."""

    def __init__(self, bins: int, low: float, high: float) -> None:
        super().__init__()
        check_levels(bins, low, high)
        self.bins, self.low, self.high = bins, low, high

    def _index(self, x: Tensor) -> Tensor:
        """The number of the nearest level."""
        scaled = (x - self.low) * ((self.bins - 1) / (self.high - self.low))
        return scaled.round().clamp(0, self.bins - 1)

    def _level(self, index: Tensor) -> Tensor:
        return self.low + index * ((self.high - self.low) / (self.bins - 1))

    def extra_repr(self) -> str:
        return f"bins={self.bins}, low={self.low}, high={self.high}"


class DiscretizedLogistic(_Levels):
    """A logistic distribution's mass on each of `bins` levels; the decoder gives mean and log scale
    of every pixel. See `fastvae.discretized_logistic_log_prob`.

    `mean` is the logistic's location, which is the mean but for what lies beyond the levels.

    Args:
        bins, low, high: the levels.

    Raises:
        ValueError: fewer than 2 levels, or `low` not below `high`.
    """

    outputs = 2

    def __init__(self, bins: int = 256, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(bins, low, high)

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return ops.discretized_logistic_log_prob(
            x, *parts, bins=self.bins, low=self.low, high=self.high, event_ndim=x.dim() - 1
        )

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        return parts[0].clamp(self.low, self.high)

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        mean, log_scale = parts
        return self._level(self._index(mean + torch.exp(log_scale) * _logistic(eps[0])))


class DiscretizedLogisticMixture(_Levels):
    """In each pixel a mixture of discretized logistics; the decoder gives first the components'
    logits, then their means, then their log scales. See
    `fastvae.discretized_logistic_mixture_log_prob`.

    Args:
        components: of a pixel's mixture.
        bins, low, high: the levels.

    Raises:
        ValueError: no component, fewer than 2 levels, or `low` not below `high`.
    """

    draws = 2

    def __init__(
        self, components: int, bins: int = 256, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__(bins, low, high)
        if components < 1:
            raise ValueError(f"components is {components}; want at least 1")
        self.components = components
        self.outputs = 3 * components

    def _parts(self, decoded: Tensor, ndim: int) -> tuple[Tensor, ...]:
        return (decoded.unflatten(1 - ndim, (self.outputs, -1)),)  # whole, as its kernel reads it

    def _mixture(self, planes: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """Logits, means and log scales, the components along the last dimension."""
        parts = planes.unflatten(dim, (3, self.components)).unbind(dim if dim >= 0 else dim - 1)
        return tuple(part.movedim(dim, -1) for part in parts)

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        (planes,) = parts
        levels: dict[str, Any] = {"bins": self.bins, "low": self.low, "high": self.high}
        if x.requires_grad:  # which the kernel does not give
            mixture = self._mixture(planes, -x.dim())
            event_ndim = x.dim() - 1
            return ops.discretized_logistic_mixture_log_prob(
                x, *mixture, event_ndim=event_ndim, **levels
            )
        rows = planes.shape[: planes.dim() - x.dim()]
        # Every number is a pixel of one colour.
        log_prob = ops.colour_mixture_log_prob(
            x.expand(*rows[:-1], *x.shape).reshape(rows.numel(), 1, -1),
            planes.reshape(rows.numel(), self.outputs, -1),
            components=self.components,
            least_log_scale=-math.inf,
            **levels,
        )
        return log_prob.reshape(rows)

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        (planes,) = parts
        logits, mean, _ = self._mixture(planes)
        return (torch.softmax(logits, -1) * mean.clamp(self.low, self.high)).sum(-1)

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        logits, mean, log_scale = self._mixture(parts[0])
        chosen = _choose(eps[1], logits).unsqueeze(-1)
        mean, log_scale = (t.gather(-1, chosen).squeeze(-1) for t in (mean, log_scale))
        return self._level(self._index(mean + torch.exp(log_scale) * _logistic(eps[0])))

    def extra_repr(self) -> str:
        return f"components={self.components}, {super().extra_repr()}"


class Categorical(_Levels):
    """Any distribution over `bins` levels, or over classes: the decoder gives the logits.

    x is a floating-point tensor of levels, or int64 class indices. The classes' means and samples
    are levels too.

    Args:
        bins, low, high: the levels.

    Raises:
        ValueError: fewer than 2 levels, or `low` not below `high`.
    """

    def __init__(self, bins: int = 256, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(bins, low, high)
        self.outputs = bins

    def check(self, x: Tensor) -> None:
        if x.is_floating_point():
            return super().check(x)
        if ((x < 0) | (x >= self.bins)).any():
            raise ValueError(
                f"x has classes {x.min().item()} to {x.max().item()}; want 0 to {self.bins - 1}"
            )

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        index = self._index(x).long() if x.is_floating_point() else x
        return ops.categorical_log_prob(index, torch.stack(parts, -1), event_ndim=x.dim() - 1)

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        levels = self._level(torch.arange(self.bins, device=parts[0].device))
        return (torch.softmax(torch.stack(parts, -1), -1) * levels.to(parts[0].dtype)).sum(-1)

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return self._level(_choose(eps[0], torch.stack(parts, -1)))


def _logistic(eps: Tensor) -> Tensor:
    """A standard logistic variable, ln(u / (1 - u)) of u = Phi(eps), exact in both tails."""
    return torch.special.log_ndtr(eps) - torch.special.log_ndtr(-eps)


def _choose(eps: Tensor, logits: Tensor) -> Tensor:
    """An index along the last dimension, with probabilities softmax(logits)."""
    below = torch.softmax(logits, -1).cumsum(-1)[..., :-1] < torch.special.ndtr(eps).unsqueeze(-1)
    return below.sum(-1)
