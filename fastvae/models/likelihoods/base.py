"""What all likelihoods have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops

__all__ = ["Likelihood", "check_positive"]

_CHECKED = 4096  # examples at a time: the masks of all would take as much memory as data


class Likelihood(nn.Module):
    """Elements that are independent given z.

    A subclass says how one is distributed, by `_log_prob`, `_mean` and `_sample`; each gets the
    `outputs` parts of the decoder's output, of x's shape.
    """

    outputs: int = 1
    """How many numbers of the decoder's output belong to one element of x."""
    draws: int = 1
    """How many normals it takes to sample one element."""
    low: float = -math.inf
    """The least and (`high`) the greatest x that it accepts, and whether only whole numbers."""
    high: float = math.inf
    whole: bool = False

    def check(self, x: Tensor) -> None:
        """Looks at data once, which `log_prob` does not do.

        Raises:
            ValueError: x is not what the likelihood accepts: the message has the first example and
                the value.
        """
        for start in range(0, len(x), _CHECKED):
            self._check(x[start : start + _CHECKED], start)

    def _check(self, x: Tensor, start: int) -> None:
        bad = ~((x >= self.low) & (x <= self.high) & x.isfinite())  # NaN is bad
        if self.whole:
            bad |= x != x.floor()
        if not bad.any():
            return
        example = int(bad.flatten(1).any(1).nonzero()[0])
        value = x[example][bad[example]][0].item()
        wanted = "finite numbers"
        if self.high < math.inf:
            wanted = f"numbers from {self.low:g} to {self.high:g}"
        elif self.whole:
            wanted = f"whole numbers of {self.low:g} or more"
        name = type(self).__name__
        raise ValueError(f"x has {value:g} in example {start + example}; want {wanted} for {name}")

    def context(self, condition: Any, x: Tensor | None = None) -> dict[str, Any]:
        """What the three methods below are told beside the decoder's output, by keyword, of the
        model's condition and, where there are any, the data: nothing, for most likelihoods."""
        return {}

    def log_prob(self, x: Tensor, decoded: Tensor, **context: Any) -> Tensor:
        """ln p(x | z) in nats.

        Args:
            x: [B, C, ...].
            decoded: the decoder's output, [B, outputs * C, ...]; dimensions in front of these, such
                as samples of z, are kept.

        Returns:
            [B], or [..., B]; float32 for half types.

        Raises:
            ValueError: `decoded` does not have that shape.
        """
        want = [x.shape[0], self.outputs * x.shape[1], *x.shape[2:]] if x.dim() > 1 else [*x.shape]
        if list(decoded.shape[decoded.dim() - x.dim() :]) != want:
            rule = f", {self.outputs} times as long in dimension 1" if self.outputs > 1 else ""
            raise ValueError(
                f"decoder returned shape {list(decoded.shape)}; want that of x{rule}, {want}"
            )
        if x.is_floating_point():
            decoded = decoded.to(x.dtype)  # under autocast it is not x's
        return self._log_prob(x, *self._parts(decoded, x.dim()), **context)

    def mean(self, decoded: Tensor, **context: Any) -> Tensor:
        """E[x | z], [B, C, ...], from the decoder's output [B, outputs * C, ...]."""
        return self._mean(*self._parts(decoded, decoded.dim()), **context)

    @torch.no_grad()
    def sample(
        self,
        decoded: Tensor,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
        **context: Any,
    ) -> Tensor:
        """x ~ p(x | z), [B, C, ...], without gradients; noise as in `fastvae.rsample`."""
        parts = self._parts(decoded, decoded.dim())
        of_each = decoded.chunk(self.outputs, 1)[0] if self.outputs > 1 else decoded
        zeros = torch.zeros_like(of_each, dtype=torch.float64)
        eps = ops.rsample(zeros, 0.0, sample_shape=(self.draws,), seed=seed, generator=generator)
        sample = self._sample(eps, *(part.double() for part in parts), **context)
        return sample.to(decoded.dtype)

    def _parts(self, decoded: Tensor, ndim: int) -> tuple[Tensor, ...]:
        """Views; `ndim` is x's number of dimensions."""
        return decoded.chunk(self.outputs, 1 - ndim) if self.outputs > 1 else (decoded,)

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        raise NotImplementedError

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        raise NotImplementedError

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        """From normals `eps`, [draws, B, C, ...]; in float64."""
        raise NotImplementedError


def check_positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; want a number above 0")
    return value
