"""What the definitions of the ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import event_dims

__all__ = ["computed_in", "event_sum", "standardize"]


def computed_in(t: Tensor) -> Tensor:
    """Half types are computed in float32."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def standardize(difference: Tensor, log_sigma: Tensor) -> Tensor:
    """difference / sigma. Where the values are equal that is 0, even if 1 / sigma overflows."""
    lost = (difference == 0) & (torch.exp(-log_sigma) == math.inf)
    return torch.where(lost, 0, difference) * torch.exp(-torch.where(lost, 0, log_sigma))


def event_sum(elements: Tensor, shape: torch.Size, event_ndim: int | None) -> Tensor:
    """The sum over the last `event_ndim` dimensions of `shape`, by default all but the first."""
    elements = elements.expand(shape)
    dims = event_dims(event_ndim, len(shape))
    return elements.sum(tuple(range(-dims, 0))) if dims else elements.clone()
