"""What counts look like, and what a model makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import conditions
from ..models.vae import VAE

__all__ = ["LogCounts", "Statistics", "replicate"]


class LogCounts(nn.Module):
    """ln(1 + x), what an encoder of counts is given."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(x)


@dataclass(frozen=True)
class Statistics:
    """Of each element over a data set [N, ...]."""

    mean: Tensor
    variance: Tensor
    zeros: Tensor
    """Share of the examples."""

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        x = x.flatten(1).double()
        return cls(x.mean(0), x.var(0, correction=0), (x == 0).double().mean(0))

    def summary(self) -> dict[str, float]:
        """Of the whole table."""
        return {
            "mean": self.mean.mean().item(),
            "variance": self.variance.mean().item(),
            "zeros": self.zeros.mean().item(),
        }


@torch.no_grad()
def replicate(
    model: VAE, x: Tensor, condition: Any = None, *, seed: int = 0, batch_size: int = 256
) -> Tensor:
    """Data as the model would have drawn them in x's place: x' ~ p(x' | z), z ~ q(z | x), of the
    same totals."""
    parts = []
    for k, (batch, c) in enumerate(conditions.batches(x, condition, batch_size)):
        context: dict[str, Any] = model.likelihood.context(c, batch)
        z = model.encode(batch, c).rsample(seed=seed + k)
        parts.append(model.likelihood.sample(model.decode(z, c), seed=~(seed + k), **context))
    return torch.cat(parts)
