"""`Bound`: floors and ceilings of log-variances."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["Bound", "Numbers"]

_KINDS = ("hard", "soft", "straight_through")  # in the order of the kernels' codes

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

    A NaN stays one. The fused ops take a bound of their `logvar` as an argument, and read and
    differentiate through it in the same pass; called on a tensor, it is plain PyTorch.

    Args:
        low, high: the ends.
        kind: one of these.

    Raises:
        ValueError: `low` is not below `high`, or an unknown `kind`.

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

    def __call__(self, logvar: Tensor) -> Tensor:
        if self.kind == "soft":
            if self.high < math.inf:
                logvar = self.high - _softplus(self.high - logvar)
            if self.low > -math.inf:
                logvar = self.low + _softplus(logvar - self.low)
            return logvar
        bounded = logvar.clamp(self.low, self.high)
        return bounded if self.kind == "hard" else bounded.detach() + (logvar - logvar.detach())

    @property
    def numbers(self) -> Numbers:
        return float(_KINDS.index(self.kind)), float(self.low), float(self.high)

    @classmethod
    def from_numbers(cls, numbers: Numbers) -> Bound:
        kind, low, high = numbers
        return cls(low, high, _KINDS[int(kind)])


def _softplus(t: Tensor) -> Tensor:
    return softplus(t, threshold=40)  # above 20, the default, float64 would lose half its digits
