"""Log-probabilities of pixels other than the Gaussian's.

As the ops of `fastvae.functional`: values are nats, summed over the last `event_ndim` dimensions,
by default all but the first; arguments broadcast against each other and may be numbers; half types
are computed and summed in float32; a wrong dtype raises TypeError, a wrong shape or device
ValueError. All are differentiable in every argument, and stable: no difference of nearly equal
numbers, no overflow that a result does not have.

Those whose cost is a pass over the pixels are fused ops, defined by their twins in
`fastvae.reference`; the mixture and the categorical are plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from . import reference
from ._arguments import (
    TensorLike,
    check_levels,
    event_dims,
    gaussian_arguments,
    log_prob_arguments,
)
from ._autograd import apply
from ._formulas import computed_in, event_sum
from ._pixel_functions import (
    BernoulliLogProb,
    ContinuousBernoulliLogProb,
    DiscretizedLogisticLogProb,
    LaplaceLogProb,
)
from .functional import has_kernels

__all__ = [
    "bernoulli_log_prob",
    "categorical_log_prob",
    "continuous_bernoulli_log_prob",
    "discretized_logistic_log_prob",
    "discretized_logistic_mixture_log_prob",
    "laplace_log_prob",
]


def bernoulli_log_prob(
    x: TensorLike, logits: TensorLike, *, event_ndim: int | None = None
) -> Tensor:
    """x ln s(l) + (1 - x) ln s(-l), with s(l) = 1 / (1 + e^-l) the probability of x = 1.

    Args:
        x: 0 or 1, or between them for the usual cross-entropy of grey values, which is then no
            normalized density: `continuous_bernoulli_log_prob` is.
        logits: l, of any size.
        event_ndim: how many trailing dimensions are summed; default all but the first.

    Returns:
        Nats, of shape `logits.shape[:-event_ndim]`.
    """
    tensors, shape = gaussian_arguments(x=x, logits=logits)
    dims = event_dims(event_ndim, len(shape))
    if not has_kernels(tensors[0]):
        return reference.bernoulli_log_prob(*tensors, event_ndim=dims)
    return apply(BernoulliLogProb, *tensors, dims)


def continuous_bernoulli_log_prob(
    x: TensorLike, logits: TensorLike, *, event_ndim: int | None = None
) -> Tensor:
    """ln of the density s(l)^x s(-l)^(1 - x) C(l) on [0, 1], C(l) = l / tanh(l / 2).

    The Bernoulli made a density over grey values (Loaiza-Ganem & Cunningham 2019, "The continuous
    Bernoulli"). It is e^{x l} l / (e^l - 1), hence the value

        (x - 1/2) l - ln sinhc(l / 2),    sinhc(h) = sinh(h) / h

    which is 0 at l = 0, where C is 2 and published code interpolates.

    Args:
        x: in [0, 1].
        logits: l, of any size.
        event_ndim: how many trailing dimensions are summed; default all but the first.

    Returns:
        Nats, of shape `logits.shape[:-event_ndim]`.
    """
    tensors, shape = gaussian_arguments(x=x, logits=logits)
    dims = event_dims(event_ndim, len(shape))
    if not has_kernels(tensors[0]):
        return reference.continuous_bernoulli_log_prob(*tensors, event_ndim=dims)
    return apply(ContinuousBernoulliLogProb, *tensors, dims)


def laplace_log_prob(
    x: TensorLike, mean: TensorLike, log_scale: TensorLike = 0.0, *, event_ndim: int | None = None
) -> Tensor:
    """-|x - m| / b - ln b - ln 2, with b = e^log_scale: absolute instead of squared errors.

    Args:
        x, mean: the data and the decoder's output.
        log_scale: ln b: a number, a scalar tensor, or per channel or pixel.
        event_ndim: how many trailing dimensions are summed; default all but the first.

    Returns:
        Nats, of shape `mean.shape[:-event_ndim]`.
    """
    tensors, number, shape = log_prob_arguments(x, mean, log_scale=log_scale)
    dims = event_dims(event_ndim, len(shape))
    if not has_kernels(tensors[0]):
        return reference.laplace_log_prob(x, mean, log_scale, event_ndim=dims)
    return apply(LaplaceLogProb, *tensors, number, dims)


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

    Returns:
        Nats, of shape `mean.shape[:-event_ndim]`.
    """
    check_levels(bins, low, high)
    tensors, shape = gaussian_arguments(x=x, mean=mean, log_scale=log_scale)
    dims = event_dims(event_ndim, len(shape))
    if not has_kernels(tensors[0]):
        return reference.discretized_logistic_log_prob(
            *tensors, bins=bins, low=low, high=high, event_ndim=dims
        )
    return apply(DiscretizedLogisticLogProb, *tensors, bins, float(low), float(high), dims)


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


def categorical_log_prob(x: Tensor, logits: Tensor, *, event_ndim: int | None = None) -> Tensor:
    """ln softmax(logits) at the class x.

    Args:
        x: int64 class indices.
        logits: of shape x.shape + [classes], or with more leading dimensions.
        event_ndim: how many trailing dimensions of x are summed; default all but the first.

    Returns:
        Nats, of shape `x.shape[:-event_ndim]`, or that which it broadcasts to.

    Raises:
        TypeError: x is not int64.
    """
    if x.dtype != torch.int64:
        raise TypeError(f"x has dtype {x.dtype}; want torch.int64, class indices")
    log_prob = log_softmax(computed_in(logits), -1)
    index = x.expand(log_prob.shape[:-1]).unsqueeze(-1)
    log_prob = log_prob.gather(-1, index).squeeze(-1)
    return event_sum(log_prob, log_prob.shape, event_ndim)
