"""The definition of the log-probabilities of pixels, as `reference` is of the ops of Gaussians.

`fastvae.reference` has these functions too. They are stable: no difference of nearly equal numbers,
no overflow that a result does not have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._arguments import TensorLike, check_levels, gaussian_arguments
from ._formulas import computed_in, event_sum, standardize

__all__ = [
    "bernoulli_log_prob",
    "continuous_bernoulli_log_prob",
    "continuous_bernoulli_mean",
    "discretized_logistic_log_prob",
    "laplace_log_prob",
]


def bernoulli_log_prob(
    x: TensorLike, logits: TensorLike, *, event_ndim: int | None = None
) -> Tensor:
    """See `fastvae.bernoulli_log_prob`."""
    (x, logits), shape = gaussian_arguments(x=x, logits=logits)
    x, logits = computed_in(x), computed_in(logits)
    return event_sum(x * logsigmoid(logits) + (1 - x) * logsigmoid(-logits), shape, event_ndim)


# ---- Continuous Bernoulli ------------------------------------------------------------------------


def continuous_bernoulli_log_prob(
    x: TensorLike, logits: TensorLike, *, event_ndim: int | None = None
) -> Tensor:
    """See `fastvae.continuous_bernoulli_log_prob`."""
    (x, logits), shape = gaussian_arguments(x=x, logits=logits)
    x, logits = computed_in(x), computed_in(logits)
    # Far from 0: the part of ln sinhc that is |h| cancels against (x - 1/2) l by hand.
    a = torch.where(_near_half(logits), 1, logits.abs())
    linear = -(x * (-logits).relu() + (1 - x) * logits.relu())
    far = linear + torch.log(a) - torch.log(-torch.expm1(-a))
    small = _within_half(logits)
    near = (x - 0.5) * small - _log_sinhc_near_0(small)
    return event_sum(torch.where(_near_half(logits), near, far), shape, event_ndim)


def continuous_bernoulli_mean(logits: Tensor) -> Tensor:
    """1 / (1 - e^-l) - 1 / l, the mean of the continuous Bernoulli: 1/2 at l = 0."""
    l = computed_in(logits)  # noqa: E741
    a = torch.where(_near_half(l), 1, l)
    far = -1 / torch.expm1(-a) - 1 / a
    h = _within_half(l) / 2
    near = (
        0.5 + 0.5 * _polynomial(h * h, [2 * n * c for n, c in enumerate(_LOG_SINHC, start=1)]) * h
    )
    return torch.where(_near_half(l), near, far).to(logits.dtype)


# ln(sinh(h) / h) = h^2/6 - h^4/180 + ..., for |h| < pi; to double precision for |h| <= 1/4.
_LOG_SINHC = (
    1 / 6,
    -1 / 180,
    1 / 2835,
    -1 / 37800,
    1 / 467775,
    -691 / 3831077250,
    2 / 127702575,
)


def _near_half(logits: Tensor) -> Tensor:
    """Where the probability is near 1/2, so that series serve."""
    return logits.abs() < 0.5


def _within_half(logits: Tensor) -> Tensor:
    return torch.where(_near_half(logits), logits, 0)


def _log_sinhc_near_0(logits: Tensor) -> Tensor:
    square = logits * logits / 4
    return square * _polynomial(square, list(_LOG_SINHC))


def _polynomial(t: Tensor, coefficients: list[float]) -> Tensor:
    """c0 + c1 t + ..., by Horner's rule."""
    value = torch.zeros_like(t)
    for c in reversed(coefficients):
        value = value * t + c
    return value


# ---- Laplace and discretized logistic ------------------------------------------------------------


def laplace_log_prob(
    x: TensorLike, mean: TensorLike, log_scale: TensorLike = 0.0, *, event_ndim: int | None = None
) -> Tensor:
    """See `fastvae.laplace_log_prob`."""
    if isinstance(log_scale, int | float):  # a number is not rounded to a half type
        (x, mean), shape = gaussian_arguments(x=x, mean=mean)
        log_scale = torch.full((), log_scale, dtype=computed_in(x).dtype, device=x.device)
    else:
        (x, mean, log_scale), shape = gaussian_arguments(x=x, mean=mean, log_scale=log_scale)
    x, mean, log_scale = computed_in(x), computed_in(mean), computed_in(log_scale)
    log_prob = -standardize(x - mean, log_scale).abs() - log_scale - math.log(2)
    return event_sum(log_prob, shape, event_ndim)


def discretized_logistic_log_prob(
    x: TensorLike,
    mean: TensorLike,
    log_scale: TensorLike = 0.0,
    *,
    bins: int = 256,
    low: float = 0.0,
    high: float = 1.0,
    event_ndim: int | None = None,
) -> Tensor:
    """See `fastvae.discretized_logistic_log_prob`."""
    check_levels(bins, low, high)
    (x, mean, log_scale), shape = gaussian_arguments(x=x, mean=mean, log_scale=log_scale)
    x, mean, log_scale = computed_in(x), computed_in(mean), computed_in(log_scale)
    width = (high - low) / (bins - 1)
    first, last = x < low + width / 2, x > high - width / 2
    # Where an end is not used, a 0 keeps infinities out of the gradients.
    upper = torch.where(last, 0, x - mean + width / 2)
    lower = torch.where(first, 0, mean - x + width / 2)
    below_upper_end = logsigmoid(standardize(upper, log_scale))
    above_lower_end = logsigmoid(standardize(lower, log_scale))
    inside = below_upper_end + above_lower_end + _log_decay(math.log(width) - log_scale)
    log_prob = torch.where(first, below_upper_end, torch.where(last, above_lower_end, inside))
    return event_sum(log_prob, shape, event_ndim)


def _log_decay(log_t: Tensor) -> Tensor:
    """ln(1 - e^-t), also of t that overflow or underflow."""
    t = torch.exp(log_t.clamp(max=7))  # e^{-e^7} is 0
    small = t < 0.5
    near = log_t - t / 2 + _log_sinhc_near_0(torch.where(small, t, 0))
    return torch.where(small, near, torch.log(-torch.expm1(-torch.where(small, 1, t))))
