"""The logarithm of a discretized logistic distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..elements import precision
from .factors import factor

__all__ = ["discretized_logistic"]


def discretized_logistic(
    x: Tensor, mean: Tensor, log_scale: Tensor, width: float, low: float, high: float
) -> Tensor:
    """ln of a logistic distribution's probability of a bin of `width` around x, and of all beyond
    the bins of `low` and `high`; all broadcast."""
    return _DiscretizedLogistic.apply(x, mean, log_scale, width, low, high)


class _DiscretizedLogistic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        log_scale: Tensor,
        width: float,
        low: float,
        high: float,
    ) -> Tensor:
        # 1 where a bin has that end, 0 where it reaches to infinity.
        has_lower = factor(torch.ge, x, low + width / 2)
        has_upper = factor(torch.le, x, high - width / 2)
        inverse, upper, lower = _ends(x, mean, log_scale, width, has_upper, has_lower)
        ctx.save_for_backward(x, mean, log_scale, has_upper, has_lower, inverse, upper, lower)
        ctx.width = width
        value = logsigmoid(upper * inverse).mul_(has_upper)
        value = value.addcmul_(logsigmoid(lower * inverse), has_lower)
        log_decay = torch.expm1(_decay(width, inverse).neg_()).neg_().log_()
        return value.add_(has_upper * has_lower * log_decay)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, log_scale, has_upper, has_lower, inverse, upper, lower = ctx.saved_tensors
        if torch.is_grad_enabled():
            inverse, upper, lower = _ends(x, mean, log_scale, ctx.width, has_upper, has_lower)
        by_above = torch.sigmoid(-upper * inverse) * has_upper * grad
        by_below = torch.sigmoid(-lower * inverse) * has_lower * grad
        by_x = (by_above - by_below) * inverse
        by_mean = -by_x.sum_to_size(mean.shape)
        by_x = by_x.sum_to_size(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return by_x, by_mean, None, None, None, None
        t = _decay(ctx.width, inverse)
        by_decay = t / torch.expm1(t) * has_upper * has_lower * grad
        by_log_scale = -(by_above * upper + by_below * lower) * inverse - by_decay
        return by_x, by_mean, by_log_scale.sum_to_size(log_scale.shape), None, None, None


def _ends(
    x: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    width: float,
    has_upper: Tensor,
    has_lower: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """1 / scale, and how far the mean is below the upper end of a bin and above its lower one: 0
    where there is none."""
    difference = x - mean
    upper, lower = width / 2 + difference, width / 2 - difference
    return precision(log_scale), upper * has_upper, lower * has_lower


def _decay(width: float, inverse: Tensor) -> Tensor:
    """w / scale, finite and above 0, so that t / (e^t - 1) is 1 where it underflows."""
    return (width * inverse).clamp(min=torch.finfo(inverse.dtype).tiny)
