"""Log-probabilities of real numbers: the Gaussian. Its arguments are those of `gaussian.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import eager
from .arguments import (
    TensorLike,
    check_bound,
    check_param,
    event_dims,
    log_prob_arguments,
    weight_argument,
)
from .bounds import Bound, Raised
from .declare import declare, loss_of
from .elements import (
    event_total,
    log_density_total,
    log_sigma,
    log_variance,
    of_number,
    precision,
    squared_difference,
    standardize,
)
from .forms import scale_form
from .op import Request

__all__ = ["gaussian_log_prob", "gaussian_nll_loss"]


def _log_prob(x: Tensor, mean: Tensor, logvar: Tensor, *, param: str) -> Tensor:
    """-1/2 w^2 - h - 1/2 ln 2 pi, w = (x - mean) / sigma"""
    h = log_sigma(logvar, param)
    w = standardize(x - mean, h)
    return -0.5 * w * w - h - 0.5 * math.log(2 * math.pi)


def _log_prob_eager(
    x: Tensor, mean: Tensor, logvar: Tensor | float, *, param: str, event: torch.Size
) -> Tensor:
    constant = math.log(2 * math.pi)
    if not isinstance(logvar, Tensor):
        squares = squared_difference(x, mean)
        log_var = of_number(log_variance, logvar, param)
        weight = -0.5 * of_number(precision, log_var, squares.dtype)
        return weight * event_total(squares, event) - 0.5 * event.numel() * (log_var + constant)
    lv = log_variance(logvar, param)
    if x.shape == mean.shape == lv.shape:
        return eager.gaussian_log_prob(x, mean, lv, len(event))
    squares = squared_difference(x, mean)
    return log_density_total(squares, lv, 0.5, 0.5 * constant, event)


@declare(_log_prob, eager=_log_prob_eager)
def gaussian_log_prob(
    x: TensorLike,
    mean: TensorLike,
    logvar: TensorLike = 0.0,
    *,
    param: str = "logvar",
    min_std: float = 0.0,
    bound: Bound | Raised | None = None,
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """log N(x; mean, sigma^2) = -1/2 ((x - mean)^2 e^{-lv} + lv + ln 2 pi), summed over an event.

    Args:
        x, mean: the data and the decoder's output.
        logvar: a number, a learned scalar, or any tensor that broadcasts (per channel, per pixel):
            its gradient is reduced to its shape. Read by `param`: a fixed sigma of 0.1 is
            `gaussian_log_prob(x, mean, 0.1, param="std")`.
        bound: of `logvar`, such as the floor without which a pixel that is fitted exactly drives it
            to minus infinity.
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: of each element, as in `kl_divergence`: a mask of missing features, padded frames.

    Returns:
        Nats, of shape `mean.shape[:-event_ndim]`.
    """
    form, bound = scale_form(param, bound, min_std)
    operands, scale, shape = log_prob_arguments(x, mean, logvar=logvar)
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "scale": scale,
        "param": check_param(form),
        "event_ndim": event_dims(event_ndim, len(shape)),
        "bound": check_bound(bound, form),
    }


gaussian_nll_loss = loss_of(gaussian_log_prob)
