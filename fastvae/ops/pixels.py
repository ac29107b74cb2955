"""Log-probabilities of pixels other than the Gaussian's.

As the ops of Gaussians: values are nats, summed over the last `event_ndim` dimensions,
by default all but the first; arguments broadcast against each other and may be numbers; half types
are computed and summed in float32; a wrong dtype raises TypeError, a wrong shape or device
ValueError. All are differentiable in every argument, and stable: no difference of nearly equal
numbers, no overflow that a result does not have.

Those whose cost is a pass over the pixels are fused ops, under their definitions; the mixture is
plain PyTorch. Each has a loss that ends in it, its `*_nll_loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    log_softmax,
    logsigmoid,
)

from . import eager
from .arguments import (
    TensorLike,
    check_levels,
    event_dims,
    log_prob_arguments,
    tensor_arguments,
    weight_argument,
)
from .declare import declare, loss_of
from .elements import (
    computed_in,
    event_sum,
    event_total,
    log_density_total,
    of_number,
    precision,
    standardize,
)
from .op import Request

__all__ = [
    "bernoulli_log_prob",
    "bernoulli_nll_loss",
    "continuous_bernoulli_log_prob",
    "continuous_bernoulli_mean",
    "continuous_bernoulli_nll_loss",
    "discretized_logistic_log_prob",
    "discretized_logistic_mixture_log_prob",
    "discretized_logistic_mixture_nll_loss",
    "discretized_logistic_nll_loss",
    "laplace_log_prob",
    "laplace_nll_loss",
]


# ---- Bernoulli -----------------------------------------------------------------------------------


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return x * logsigmoid(logits) + (1 - x) * logsigmoid(-logits)


def _bernoulli_eager(x: Tensor, logits: Tensor, *, event: torch.Size) -> Tensor:
    return -event_total(_cross_entropy(x, logits), event)


def _cross_entropy(x: Tensor, logits: Tensor) -> Tensor:
    if x.shape != logits.shape:
        x, logits = torch.broadcast_tensors(x, logits)
    return binary_cross_entropy_with_logits(logits, x, reduction="none")


@declare(_bernoulli, eager=_bernoulli_eager)
def bernoulli_log_prob(
    x: TensorLike,
    logits: TensorLike,
    *,
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """x ln s(l) + (1 - x) ln s(-l), with s(l) = 1 / (1 + e^-l) the probability of x = 1.

    Args:
        x: 0 or 1, or between them for the usual cross-entropy of grey values, which is then no
            normalized density: `continuous_bernoulli_log_prob` is.
        logits: l, of any size.
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: of each element, as in `kl_divergence`: a mask of what is missing.

    Returns:
        Nats, of shape `logits.shape[:-event_ndim]`.
    """
    operands, shape = tensor_arguments(x=x, logits=logits)
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "event_ndim": event_dims(event_ndim, len(shape)),
    }


bernoulli_nll_loss = loss_of(bernoulli_log_prob)


# ---- Continuous Bernoulli ------------------------------------------------------------------------


def _continuous_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    # Far from 0: the part of ln sinhc that is |h| cancels against (x - 1/2) l by hand.
    a = torch.where(_near_half(logits), 1, logits.abs())
    linear = -(x * (-logits).relu() + (1 - x) * logits.relu())
    far = linear + torch.log(a) - torch.log(-torch.expm1(-a))
    small = _within_half(logits)
    near = (x - 0.5) * small - _log_sinhc_near_0(small)
    return torch.where(_near_half(logits), near, far)


def _continuous_bernoulli_eager(x: Tensor, logits: Tensor, *, event: torch.Size) -> Tensor:
    """The Bernoulli's value and ln C(l), C(l) = l / tanh(l / 2)."""
    # Above, the gradient of ln C is the difference of two that grow as 1 / l.
    near = logits.abs() < (0.1 if logits.dtype == torch.float32 else 0.01)
    far = torch.where(near, 1, logits)
    square = logits * logits
    series = square * (1 / 12 - 7 / 1440 * square) + math.log(2)
    log_c = torch.where(near, series, torch.log(far / torch.tanh(0.5 * far)))
    return event_total(log_c - _cross_entropy(x, logits), event)


@declare(_continuous_bernoulli, eager=_continuous_bernoulli_eager)
def continuous_bernoulli_log_prob(
    x: TensorLike,
    logits: TensorLike,
    *,
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """ln of the density s(l)^x s(-l)^(1 - x) C(l) on [0, 1], C(l) = l / tanh(l / 2).

    The Bernoulli made a density over grey values (Loaiza-Ganem & Cunningham 2019, "The continuous
    Bernoulli"). It is e^{x l} l / (e^l - 1), hence the value

        (x - 1/2) l - ln sinhc(l / 2),    sinhc(h) = sinh(h) / h

    which is 0 at l = 0, where C is 2 and published code interpolates.

    Args:
        x: in [0, 1].
        logits: l, of any size.
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: of each element, as in `kl_divergence`: a mask of what is missing.

    Returns:
        Nats, of shape `logits.shape[:-event_ndim]`.
    """
    operands, shape = tensor_arguments(x=x, logits=logits)
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "event_ndim": event_dims(event_ndim, len(shape)),
    }


continuous_bernoulli_nll_loss = loss_of(continuous_bernoulli_log_prob)


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


# ---- Laplace -------------------------------------------------------------------------------------


def _laplace(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return -standardize(x - mean, log_scale).abs() - log_scale - math.log(2)


def _laplace_eager(
    x: Tensor, mean: Tensor, log_scale: Tensor | float, *, event: torch.Size
) -> Tensor:
    distance = (x - mean).abs()
    if not isinstance(log_scale, Tensor):
        weight = of_number(precision, log_scale, distance.dtype)
        return -weight * event_total(distance, event) - event.numel() * (log_scale + math.log(2))
    return log_density_total(distance, log_scale, 1, math.log(2), event)


@declare(_laplace, eager=_laplace_eager)
def laplace_log_prob(
    x: TensorLike,
    mean: TensorLike,
    log_scale: TensorLike = 0.0,
    *,
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """-|x - m| / b - ln b - ln 2, with b = e^log_scale: absolute instead of squared errors.

    Args:
        x, mean: the data and the decoder's output.
        log_scale: ln b: a number, a scalar tensor, or per channel or pixel.
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: of each element, as in `kl_divergence`: a mask of what is missing.

    Returns:
        Nats, of shape `mean.shape[:-event_ndim]`.
    """
    operands, scale, shape = log_prob_arguments(x, mean, log_scale=log_scale)
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "scale": scale,
        "event_ndim": event_dims(event_ndim, len(shape)),
    }


laplace_nll_loss = loss_of(laplace_log_prob)


# ---- Discretized logistic ------------------------------------------------------------------------


def _discretized_logistic(
    x: Tensor, mean: Tensor, log_scale: Tensor, *, bins: int, low: float, high: float
) -> Tensor:
    width = (high - low) / (bins - 1)
    first, last = x < low + width / 2, x > high - width / 2
    # Where an end is not used, a 0 keeps infinities out of the gradients.
    upper = torch.where(last, 0, x - mean + width / 2)
    lower = torch.where(first, 0, mean - x + width / 2)
    below_upper_end = logsigmoid(standardize(upper, log_scale))
    above_lower_end = logsigmoid(standardize(lower, log_scale))
    inside = below_upper_end + above_lower_end + _log_decay(math.log(width) - log_scale)
    return torch.where(first, below_upper_end, torch.where(last, above_lower_end, inside))


def _log_decay(log_t: Tensor) -> Tensor:
    """ln(1 - e^-t), also of t that overflow or underflow."""
    t = torch.exp(log_t.clamp(max=7))  # e^{-e^7} is 0
    small = t < 0.5
    near = log_t - t / 2 + _log_sinhc_near_0(torch.where(small, t, 0))
    return torch.where(small, near, torch.log(-torch.expm1(-torch.where(small, 1, t))))


def _discretized_logistic_eager(
    x: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    bins: int,
    low: float,
    high: float,
    event: torch.Size,
) -> Tensor:
    width = (high - low) / (bins - 1)
    return event_total(eager.discretized_logistic(x, mean, log_scale, width, low, high), event)


@declare(_discretized_logistic, eager=_discretized_logistic_eager)
def discretized_logistic_log_prob(
    x: TensorLike,
    mean: TensorLike,
    log_scale: TensorLike = 0.0,
    *,
    bins: int = 256,
    low: float = 0.0,
    high: float = 1.0,
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """ln of a logistic distribution's mass on x's bin (Kingma et al. 2016; Salimans et al. 2017).

    Values are `bins` levels from `low` to `high`, w = (high - low) / (bins - 1) apart. With
    b = e^log_scale, the bin's ends a = (x + w/2 - m) / b and c = (x - w/2 - m) / b, and s the
    logistic function, the mass is s(a) - s(c), whose logarithm is computed as

        ln s(a) + ln s(-c) + ln(1 - e^{-w / b})

    The first bin reaches to minus infinity and the last to infinity: s(a) and s(-c) alone. So the
    masses of all levels add up to 1.

    Args:
        x: levels; what lies between two is given the mass of a bin around it.
        mean: m, in the units of x.
        log_scale: ln b: a number, a scalar tensor, or per channel or pixel.
        bins: number of levels, at least 2.
        low, high: the first and the last level.
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: of each element, as in `kl_divergence`: a mask of what is missing.

    Returns:
        Nats, of shape `mean.shape[:-event_ndim]`.
    """
    check_levels(bins, low, high)
    operands, shape = tensor_arguments(x=x, mean=mean, log_scale=log_scale)
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "bins": bins,
        "low": float(low),
        "high": float(high),
        "event_ndim": event_dims(event_ndim, len(shape)),
    }


discretized_logistic_nll_loss = loss_of(discretized_logistic_log_prob)


# ---- Without kernels -----------------------------------------------------------------------------


def discretized_logistic_mixture_log_prob(
    x: Tensor,
    logits: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    bins: int = 256,
    low: float = 0.0,
    high: float = 1.0,
    event_ndim: int | None = None,
) -> Tensor:
    """ln sum_k w_k P_k(x) in each pixel, the P_k being discretized logistics (Salimans et al. 2017,
    "PixelCNN++", without its conditioning of one colour on another).

    Args:
        x: levels, as in `discretized_logistic_log_prob`.
        logits, mean, log_scale: of the components, which are their last dimension, absent from x;
            w = softmax(logits).
        bins, low, high: as in `discretized_logistic_log_prob`.
        event_ndim: how many trailing dimensions of x are summed; default all but the first.

    Returns:
        Nats, of shape `x.shape[:-event_ndim]`, or that which it broadcasts to.
    """
    components = discretized_logistic_log_prob(
        x.unsqueeze(-1), mean, log_scale, bins=bins, low=low, high=high, event_ndim=0
    )
    log_prob = torch.logsumexp(log_softmax(computed_in(logits), -1) + components, -1)
    return event_sum(log_prob, log_prob.shape, event_ndim)


discretized_logistic_mixture_nll_loss = loss_of(discretized_logistic_mixture_log_prob)
