"""`Bound`: floors and ceilings of log-variances; `Raised`: scales with a floor."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["RAISED", "Bound", "Numbers", "Raised", "from_numbers"]

_KINDS = ("hard", "soft", "straight_through", "tanh")  # in the order of the kernels' codes
RAISED = ("logvar", "log_std", "std", "var", "softplus")  # whose codes follow

Numbers = tuple[float, float, float]
"""A bound as the kernels take it: the code of its kind, and its ends."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """Keeps ln sigma^2 between `low` and `high`, each of which may be infinite.

    - "hard": min(max(lv, low), high), whose gradient is 0 outside, as in diffusers'
      `DiagonalGaussianDistribution`, from which the default bounds are.
    - "soft": high' = high - softplus(high - lv), then low + softplus(high' - low): smooth and
      strictly increasing, lv itself far from both ends (Chua et al. 2018, "Deep reinforcement
      learning in a handful of trials"). The upper end is exceeded by at most
      ln(1 + e^{low - high}).
    - "straight_through": the hard value, with the gradient of lv (Bengio et al. 2013).
    - "tanh": m + c tanh((lv - m) / c), between finite ends m - c and m + c; with ends of -5 and 5
      NVAE's (Vahdat & Kautz 2020), which it has on the mean too: `Bound(-5, 5, "tanh")(mu)`.

    A NaN stays one. The fused ops take a bound of their `logvar` as an argument, and read and
    differentiate through it in the same pass; called on a tensor, it is plain PyTorch.

    Args:
        low, high: the ends.
        kind: one of these.

    Raises:
        ValueError: `low` is not below `high`, an unknown `kind`, or "tanh" without finite ends.

    Example:
        >>> z, kl = fastvae.rsample_kl(mu, logvar, bound=fastvae.Bound())
        >>> fastvae.Bound(-6, math.inf, "soft")(logvar)
    """

    low: float = -30.0
    high: float = 20.0
    kind: str = "hard"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; want low below high")
        if self.kind not in _KINDS:
            kinds = ", ".join(map(repr, _KINDS))
            raise ValueError(f"kind is {self.kind!r}; want one of {kinds}")
        if self.kind == "tanh" and math.isinf(self.high - self.low):
            raise ValueError(
                f"low is {self.low} and high is {self.high}; want both finite with kind 'tanh'"
            )

    def __call__(self, logvar: Tensor) -> Tensor:
        if self.kind == "soft":
            if self.high < math.inf:
                logvar = self.high - _softplus(self.high - logvar)
            if self.low > -math.inf:
                logvar = self.low + _softplus(logvar - self.low)
            return logvar
        if self.kind == "tanh":
            half, middle = 0.5 * (self.high - self.low), 0.5 * (self.high + self.low)
            return middle + half * torch.tanh((logvar - middle) / half)
        bounded = logvar.clamp(self.low, self.high)
        return bounded if self.kind == "hard" else bounded.detach() + (logvar - logvar.detach())

    @property
    def numbers(self) -> Numbers:
        return float(_KINDS.index(self.kind)), float(self.low), float(self.high)


@dataclasses.dataclass(frozen=True)
class Raised:
    """What makes ln sigma of a number s whose sigma is f(s) + `floor`; the ops read it with
    `param="log_std"`.

    Attributes:
        param: what f is: "logvar" e^{s/2}, "log_std" e^s, "std" s, "var" sqrt(s), or "softplus".
        floor: at least 0, added.
    """

    param: str
    floor: float

    def __call__(self, s: Tensor) -> Tensor:
        if self.param in ("logvar", "log_std"):
            a = 0.5 * s if self.param == "logvar" else s
            if self.floor == 0:
                return a
            return math.log(self.floor) + _softplus(a - math.log(self.floor))
        if self.param == "softplus" and self.floor == 0:
            tiny = s < -20  # where softplus underflows
            log_sigma = torch.log(_softplus(torch.where(tiny, 0, s)))
            return torch.where(tiny, s - 0.5 * torch.exp(s.clamp(max=0)), log_sigma)
        return torch.log(self.sigma(s))

    def sigma(self, s: Tensor) -> Tensor:
        """sigma itself, which may underflow where there is no floor."""
        if self.param in ("logvar", "log_std"):
            f = torch.exp(0.5 * s if self.param == "logvar" else s)
        elif self.param == "softplus":
            f = _softplus(s)
        else:
            f = torch.sqrt(s) if self.param == "var" else torch.where(s < 0, math.nan, s)
        return f + self.floor

    @property
    def numbers(self) -> Numbers:
        return float(len(_KINDS) + RAISED.index(self.param)), self.floor, 0.0


def from_numbers(numbers: Numbers) -> Bound | Raised:
    """What has these numbers."""
    kind, low, high = numbers
    if kind >= len(_KINDS):
        return Raised(RAISED[int(kind) - len(_KINDS)], low)
    return Bound(low, high, _KINDS[int(kind)])


def _softplus(t: Tensor) -> Tensor:
    return softplus(t, threshold=40)  # above 20, the default, float64 would lose half its digits
