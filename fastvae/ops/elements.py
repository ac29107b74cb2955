"""What the formulas of the ops share: those that define them, and those that are as fast as eager
code goes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import event_dims

__all__ = [
    "computed_in",
    "event_sum",
    "event_total",
    "is_half",
    "log_density_total",
    "log_sigma",
    "log_variance",
    "of_log_sigma",
    "of_number",
    "precision",
    "sigma",
    "squared_difference",
    "standardize",
    "sum_last",
]


def is_half(t: Tensor) -> bool:
    """Whether a tensor is of a half type."""
    return t.dtype in (torch.bfloat16, torch.float16)


def computed_in(t: Tensor) -> Tensor:
    """Half types are computed in float32."""
    return t.float() if is_half(t) else t


# ---- The second argument of a Gaussian -----------------------------------------------------------


def log_sigma(s: Tensor, param: str) -> Tensor:
    """ln sigma of a Gaussian's second argument, float32 for half types."""
    s = computed_in(s)
    if param == "logvar":
        return 0.5 * s
    if param == "log_std":
        return s
    return torch.log(s) * (0.5 if param == "var" else 1.0)


def of_log_sigma(h: Tensor, param: str) -> Tensor:
    """A Gaussian's second argument whose ln sigma is h."""
    if param == "logvar":
        return 2 * h
    if param == "log_std":
        return h
    return torch.exp(2 * h if param == "var" else h)


def sigma(s: Tensor, param: str) -> Tensor:
    """sigma of a Gaussian's second argument, float32 for half types; NaN below 0."""
    s = computed_in(s)
    if param == "std":
        return torch.where(s < 0, math.nan, s)  # as its logarithm is
    return torch.sqrt(s) if param == "var" else torch.exp(log_sigma(s, param))


def standardize(difference: Tensor, log_sigma: Tensor) -> Tensor:
    """difference / sigma. Where the values are equal that is 0, even if 1 / sigma overflows."""
    lost = (difference == 0) & (torch.exp(-log_sigma) == math.inf)
    return torch.where(lost, 0, difference) * torch.exp(-torch.where(lost, 0, log_sigma))


def event_sum(elements: Tensor, shape: torch.Size, event_ndim: int | None) -> Tensor:
    """The sum over the last `event_ndim` dimensions of `shape`, by default all but the first."""
    elements = elements.expand(shape)
    dims = event_dims(event_ndim, len(shape))
    return sum_last(elements, dims) if dims else elements.clone()


def sum_last(elements: Tensor, dims: int) -> Tensor:
    """The sum over the last `dims` dimensions; what it is given where there are none."""
    if dims == 1:
        return elements.sum(-1)
    return elements.sum(tuple(range(-dims, 0))) if dims else elements


# ---- For eager formulas --------------------------------------------------------------------------


def event_total(elements: Tensor, event: torch.Size) -> Tensor:
    """`event_sum` over dimensions of sizes `event`, in fewer passes: what is broadcast along them
    is multiplied by how often it is there; leading dimensions are left to broadcasting."""
    shape = elements.shape
    dims = min(len(event), len(shape))
    size = shape[len(shape) - dims :]
    total = sum_last(elements, dims)
    return total if size == event else total * (event.numel() / max(size.numel(), 1))


def log_density_total(
    distance: Tensor, log_scale: Tensor, share: float, constant: float, event: torch.Size
) -> Tensor:
    """`event_total` of -share (distance e^-log_scale + log_scale) - constant."""
    weight = precision(log_scale)
    if not log_scale.dim():
        n = event.numel()
        rest = torch.rsub(log_scale, -constant * n, alpha=share * n)
        return torch.addcmul(rest, event_total(distance, event), weight, value=-share)
    rest = event_total(torch.rsub(log_scale, -constant, alpha=share), event)
    return rest.sub(event_total(distance * weight, event), alpha=share)


def log_variance(s: Tensor, param: str) -> Tensor:
    """ln sigma^2 of a Gaussian's second argument."""
    if param in ("logvar", "var"):
        return s if param == "logvar" else torch.log(s)
    return 2 * (s if param == "log_std" else torch.log(s))


def precision(log_scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """e^-log_scale, finite in `dtype`, by default its own, so that 0 times it is 0."""
    limit = math.log(torch.finfo(dtype or log_scale.dtype).max / 2)
    return log_scale.clamp(min=-limit).neg_().exp_()


@functools.lru_cache(maxsize=64)
def of_number(function: Callable[..., Tensor], value: float, *arguments: Any) -> float:
    """A function of tensors, of a number; known once it was asked for."""
    return function(torch.tensor(value, dtype=torch.float64), *arguments).item()


def squared_difference(a: Tensor, b: Tensor) -> Tensor:
    """(a - b)^2, in one pass forward and one backward."""
    if a.shape != b.shape:
        a, b = torch.broadcast_tensors(a, b)
    return F.mse_loss(a, b, reduction="none")
