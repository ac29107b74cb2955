"""Log-probabilities and KL divergences of categorical distributions over the last dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..graph import recorded, recording
from .factors import factor

__all__ = ["balanced_categorical_kl", "multinomial"]


def multinomial(x: Tensor, logits: Tensor) -> Tensor:
    """sum_i x_i ln softmax(logits)_i; x has no gradient."""
    return _Product.apply(x, torch.log_softmax(logits, -1))


def balanced_categorical_kl(
    define: Callable[..., Tensor],
    logits: Tensor,
    prior_logits: Tensor,
    balance: float,
    uniform_mix: float,
) -> Tensor:
    """KL(q || p) of each group, with `balance` of its gradient for the prior. A backward pass that
    is itself recorded goes through the definition."""
    return _BalancedKL.apply(define, logits, prior_logits, balance, uniform_mix)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_p: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # 0 times the logarithm of 0 is 0; whatever else that multiplies is far beyond -1e30.
        value = torch.linalg.vecdot(x, log_p.clamp(min=torch.finfo(log_p.dtype).min))
        return value.masked_fill_(value < -1e30, -math.inf)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, grad.unsqueeze(-1) * x


class _BalancedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        define: Callable[..., Tensor],
        logits: Tensor,
        prior_logits: Tensor,
        balance: float,
        uniform_mix: float,
    ) -> Tensor:
        ctx.define, ctx.balance, ctx.scale = define, balance, 1 - uniform_mix
        (s, q, log_q), (s_p, p, log_p) = (
            _distribution(t, uniform_mix) for t in (logits, prior_logits)
        )
        # A class that neither has is none, one that q never has is worth p.
        log_ratio = torch.nan_to_num_(log_p - log_q, nan=0.0, neginf=-math.inf)
        ctx.save_for_backward(logits, prior_logits, s, s_p, q, p, log_ratio)
        # q (p / q - 1 - ln(p / q)), which keeps its digits where q and p are near.
        far = factor(torch.gt, log_ratio, 1)
        near = log_ratio.clamp(max=1)
        terms = torch.expm1(near).sub_(near).mul_(q).mul_(1 - far)
        terms.addcmul_(log_ratio.clamp(min=1).add_(1).mul_(q).neg_().add_(p), far)
        return terms.sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, prior_logits, s, s_p, q, p, log_ratio = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if recording():
            found = recorded(ctx.define, (logits, prior_logits), needs[1:3], [grad])
            return None, *found, None, None
        grad = grad.unsqueeze(-1) * ctx.scale
        by_logits = by_prior = None
        if needs[1]:
            by_logits = _through_softmax(s, log_ratio, grad * (ctx.balance - 1))
        if needs[2]:
            ratio = q / p.clamp(min=torch.finfo(p.dtype).tiny)
            by_prior = _through_softmax(s_p, ratio, grad * -ctx.balance)
        return None, by_logits, by_prior, None, None


def _distribution(logits: Tensor, uniform_mix: float) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax; what it is with the uniform part, and that one's logarithm."""
    if uniform_mix == 0:
        log_p = torch.log_softmax(logits, -1)
        p = log_p.exp()
        return p, p, log_p
    s = torch.softmax(logits, -1)
    p = s * (1 - uniform_mix) + uniform_mix / logits.shape[-1]
    return s, p, p.log()


def _through_softmax(s: Tensor, slope: Tensor, grad: Tensor) -> Tensor:
    """The gradient of logits, from that of their softmax."""
    mean = torch.linalg.vecdot(s, slope).unsqueeze(-1)
    return (slope - mean) * s * grad
