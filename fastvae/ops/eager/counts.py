"""Log-probabilities of counts, which have no gradient; all else broadcasts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .factors import factor

__all__ = ["negative_binomial", "poisson", "sizes", "zero_inflated"]

_LARGE = 300.0
"""From this theta on, Stirling's series behind its leading terms is below 1e-6 x."""


def poisson(x: Tensor, rate: Tensor) -> Tensor:
    """x ln(rate) - rate - ln x!"""
    return (_log_mean(x, rate) * x).sub_(rate).sub_((x + 1).lgamma_())


def negative_binomial(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """ln Gamma(x + theta) - ln Gamma(theta) - ln x! + x ln(mean / theta) - (x + theta) ln(1 + mean
    / theta)"""
    return _NegativeBinomial.apply(x, mean, theta)


def zero_inflated(x: Tensor, value: Tensor, zero_logits: Tensor) -> Tensor:
    """ln(s(l) + s(-l) e^value) of a count of 0, else ln s(-l) + value."""
    return _ZeroInflated.apply(x, value, zero_logits)


class Sizes(NamedTuple):
    """A dispersion's two cases.

    Attributes:
        large, small: 1 where theta is large or is not, else 0.
        few, many: theta where it is small, else 1; theta where it is large, else the limit.
    """

    large: Tensor
    small: Tensor
    few: Tensor
    many: Tensor


def sizes(theta: Tensor) -> Sizes:
    """Of theta, whose gradient goes through."""
    large = factor(torch.gt, theta.detach(), _LARGE)
    small = 1 - large
    return Sizes(large, small, torch.addcmul(large, theta, small), theta.clamp(min=_LARGE))


class _NegativeBinomial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
        large, small, few, many = size = sizes(theta)
        growth, decay = (x / many).log1p_(), (mean / theta).log1p_()
        ctx.save_for_backward(x, mean, theta, growth, decay, *size)
        above = (x + (many - 0.5)).mul_(growth).sub_(x)
        value = (x + few).lgamma_().sub_(torch.lgamma(few)).mul_(small).addcmul_(above, large)
        value = torch.addcmul(value, x, _log_mean(x, mean) - torch.log(few))
        return value.addcmul_(x + theta, decay, value=-1).sub_((x + 1).lgamma_())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        x, mean, theta, growth, decay, *size = ctx.saved_tensors
        if torch.is_grad_enabled():
            size = sizes(theta)
            growth, decay = torch.log1p(x / size.many), torch.log1p(mean / theta)
        large, small, few, many = size
        share = (x + theta) / (theta + mean)
        by_mean = ((x / _above_0(mean) - share) * grad).sum_to_size(mean.shape)
        if not ctx.needs_input_grad[2]:
            return None, by_mean, None
        relative = x / many
        above = (growth - relative).addcdiv_(relative, x + many, value=0.5)
        below = torch.digamma(x + few).sub_(torch.digamma(few)).addcdiv_(x, few, value=-1)
        by_theta = below.mul_(small).addcmul_(above, large) - decay
        by_theta = by_theta.addcmul_(share, mean / theta) * grad
        return None, by_mean, by_theta.sum_to_size(theta.shape)


class _ZeroInflated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, zero_logits: Tensor) -> Tensor:
        odds = _odds(value, zero_logits)
        ctx.save_for_backward(x, value, zero_logits, odds)
        return (value - softplus(zero_logits)).addcmul_(factor(torch.eq, x, 0), softplus(odds))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        x, value, zero_logits, odds = ctx.saved_tensors
        if torch.is_grad_enabled():
            odds = _odds(value, zero_logits)
        share = torch.sigmoid(odds) * factor(torch.eq, x, 0) * grad
        by_logits = share - torch.sigmoid(zero_logits) * grad
        return (
            None,
            (grad - share).sum_to_size(value.shape),
            by_logits.sum_to_size(zero_logits.shape),
        )


def _odds(value: Tensor, zero_logits: Tensor) -> Tensor:
    """The logarithm of an extra zero's odds, finite where there can be none."""
    return (zero_logits - value).clamp(max=torch.finfo(value.dtype).max)


def _log_mean(x: Tensor, mean: Tensor) -> Tensor:
    """ln mean, but finite for a count of 0, which multiplies it."""
    return torch.add(mean, factor(torch.eq, x, 0), alpha=torch.finfo(mean.dtype).tiny).log_()


def _above_0(mean: Tensor) -> Tensor:
    """By which 0 can be divided."""
    return mean.clamp(min=torch.finfo(mean.dtype).tiny)
