"""Comparisons written as numbers, which multiply what they are about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["factor"]


def factor(comparison: Callable[..., Tensor], t: Tensor, number: float) -> Tensor:
    """1 where a comparison of t, such as `torch.gt`, holds, and 0 where it does not; of a t without
    a gradient."""
    return comparison(t, number, out=torch.empty_like(t))
