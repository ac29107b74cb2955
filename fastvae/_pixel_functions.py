"""The fused log-probabilities of pixels as `torch.autograd.Function`s, as those in `_functions`.

An op's tensors come first among its arguments, then its settings.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from ._autograd import Function, Gradients, find_op, log_prob_backward

__all__ = [
    "BernoulliLogProb",
    "ContinuousBernoulliLogProb",
    "DiscretizedLogisticLogProb",
    "LaplaceLogProb",
]

_bernoulli_log_prob = find_op("bernoulli_log_prob")
_bernoulli_log_prob_backward = find_op("bernoulli_log_prob_backward")
_continuous_bernoulli_log_prob = find_op("continuous_bernoulli_log_prob")
_continuous_bernoulli_log_prob_backward = find_op("continuous_bernoulli_log_prob_backward")
_laplace_log_prob = find_op("laplace_log_prob")
_laplace_log_prob_backward = find_op("laplace_log_prob_backward")
_discretized_logistic_log_prob = find_op("discretized_logistic_log_prob")
_discretized_logistic_log_prob_backward = find_op("discretized_logistic_log_prob_backward")


class BernoulliLogProb(Function):
    """x ln s(l) + (1 - x) ln s(-l)."""

    op = _bernoulli_log_prob

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, event_ndim: int) -> Tensor:
        ctx.save_for_backward(x, logits)
        ctx.settings = (event_ndim,)
        return _bernoulli_log_prob(x, logits, event_ndim)

    @staticmethod
    def formula(x: Tensor, logits: Tensor, event_ndim: int) -> Tensor:
        return reference.bernoulli_log_prob(x, logits, event_ndim=event_ndim)

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor) -> Gradients:
        op, formula = _bernoulli_log_prob_backward, BernoulliLogProb.formula
        return *log_prob_backward(ctx, op, formula, grad_log_prob), None


class ContinuousBernoulliLogProb(Function):
    """The same, times the normalizer of a density on [0, 1]."""

    op = _continuous_bernoulli_log_prob

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, event_ndim: int) -> Tensor:
        ctx.save_for_backward(x, logits)
        ctx.settings = (event_ndim,)
        return _continuous_bernoulli_log_prob(x, logits, event_ndim)

    @staticmethod
    def formula(x: Tensor, logits: Tensor, event_ndim: int) -> Tensor:
        return reference.continuous_bernoulli_log_prob(x, logits, event_ndim=event_ndim)

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor) -> Gradients:
        op, formula = _continuous_bernoulli_log_prob_backward, ContinuousBernoulliLogProb.formula
        return *log_prob_backward(ctx, op, formula, grad_log_prob), None


class LaplaceLogProb(Function):
    """-|x - m| / b - ln 2b; without a tensor `log_scale`, the number `scale` stands for it."""

    op = _laplace_log_prob

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, log_scale: Tensor | None, scale: float, event_ndim: int
    ) -> Tensor:
        ctx.save_for_backward(x, mean, log_scale)
        ctx.settings = scale, event_ndim
        return _laplace_log_prob(x, mean, log_scale, scale, event_ndim)

    @staticmethod
    def formula(
        x: Tensor, mean: Tensor, log_scale: Tensor | None, scale: float, event_ndim: int
    ) -> Tensor:
        return reference.laplace_log_prob(
            x, mean, scale if log_scale is None else log_scale, event_ndim=event_ndim
        )

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor) -> Gradients:
        op, formula = _laplace_log_prob_backward, LaplaceLogProb.formula
        return *log_prob_backward(ctx, op, formula, grad_log_prob), None, None


class DiscretizedLogisticLogProb(Function):
    """A logistic distribution's mass on one of `bins` levels."""

    op = _discretized_logistic_log_prob

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        log_scale: Tensor,
        bins: int,
        low: float,
        high: float,
        event_ndim: int,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, log_scale)
        ctx.settings = bins, low, high, event_ndim
        return _discretized_logistic_log_prob(x, mean, log_scale, bins, low, high, event_ndim)

    @staticmethod
    def formula(
        x: Tensor,
        mean: Tensor,
        log_scale: Tensor,
        bins: int,
        low: float,
        high: float,
        event_ndim: int,
    ) -> Tensor:
        return reference.discretized_logistic_log_prob(
            x, mean, log_scale, bins=bins, low=low, high=high, event_ndim=event_ndim
        )

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor) -> Gradients:
        op, formula = _discretized_logistic_log_prob_backward, DiscretizedLogisticLogProb.formula
        return *log_prob_backward(ctx, op, formula, grad_log_prob), None, None, None, None
