"""Log-probabilities of counts: Poisson, negative binomial and zero-inflated negative binomial.

As the ops of pixels: values are nats, summed over the last `event_ndim` dimensions, by default all
but the first; arguments broadcast against each other and may be numbers; integer counts are read
as float32; half types are computed and summed in float32; a wrong dtype raises TypeError, a wrong
shape or device ValueError.

Nowhere is a difference of two gamma functions formed, which in float32 loses 10^-4 nats at
theta = 1 and all digits at theta = 10^8, nor is any epsilon added: a negative binomial of large
theta runs into the Poisson distribution, a mean of 0 gives 0 nats to x = 0 and minus infinity to
all others. Counts that are negative, or parameters that are, are not looked for: what comes out
then is NaN or has no meaning. Between whole numbers the gamma functions go on, and x has the
gradient of that, where one asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from . import eager
from .arguments import TensorLike, check_param, event_dims, tensor_arguments, weight_argument
from .declare import declare, loss_of
from .elements import event_total
from .op import Request

__all__ = [
    "negative_binomial_log_prob",
    "negative_binomial_nll_loss",
    "poisson_log_prob",
    "poisson_nll_loss",
    "zero_inflated_negative_binomial_log_prob",
    "zero_inflated_negative_binomial_nll_loss",
]

_RATES = ("rate", "log_rate")  # in the order of the kernels' codes
_MEANS = ("mean", "log")


# ---- Poisson -------------------------------------------------------------------------------------


def _poisson(x: Tensor, rate: Tensor, *, param: str) -> Tensor:
    if param == "log_rate":
        return x * rate - torch.exp(rate) - torch.lgamma(x + 1)
    log_rate = torch.log(torch.where((x == 0) & (rate == 0), 1, rate))
    return x * log_rate - rate - torch.lgamma(x + 1)


def _poisson_eager(x: Tensor, rate: Tensor, *, param: str, event: torch.Size) -> Tensor:
    if param == "rate" and not x.requires_grad:
        return event_total(eager.poisson(x, rate), event)
    return event_total(_poisson(x, rate, param=param), event)


def _sum_of(plus: Sequence[Tensor], minus: Sequence[Tensor], event: torch.Size) -> Tensor:
    """Over an event, each term by itself, which takes fewer passes."""
    totals = ([event_total(t, event) for t in terms] for terms in (plus, minus))
    added, subtracted = (reduce(torch.add, terms) for terms in totals)
    return added - subtracted


def _unused(x: Tensor, mean: Tensor) -> Tensor:
    """Where 0 multiplies the logarithm of a mean, which is also the gradient of x."""
    return (x == 0) & (mean == 0) if x.requires_grad else x == 0


@declare(_poisson, eager=_poisson_eager, params=_RATES)
def poisson_log_prob(
    x: TensorLike,
    rate: TensorLike,
    *,
    param: str = "rate",
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """x ln m - m - ln x!, the Poisson distribution of mean m.

    Args:
        x: counts, of any dtype.
        rate: m, or with `param="log_rate"` its logarithm.
        param: "rate" or "log_rate".
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: of each element, as in `kl_divergence`: a mask of what is missing.

    Returns:
        Nats, of shape `rate.shape[:-event_ndim]`.
    """
    code = check_param(param, _RATES)
    operands, shape = tensor_arguments(x=x, rate=rate)
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "param": code,
        "event_ndim": event_dims(event_ndim, len(shape)),
    }


poisson_nll_loss = loss_of(poisson_log_prob)


# ---- Negative binomial ---------------------------------------------------------------------------

# From here on the series of ln Gamma, cut off behind its fourth term, is exact to 10^-21.
_LARGE = 100.0


def _negative_binomial(x: Tensor, mean: Tensor, theta: Tensor, *, param: str) -> Tensor:
    log_mean, log_theta = mean, theta
    if param == "log":
        mean, theta = torch.exp(mean), torch.exp(theta)
    empty = (x == 0) & (mean == 0)
    if param == "log":
        log_mean = torch.where(empty, 0, log_mean)
    else:
        log_mean, log_theta = torch.log(torch.where(empty, 1, mean)), torch.log(theta)
    large = theta > _LARGE
    # Where a branch is not used, constants keep its overflows out of the gradients.
    few, log_few = torch.where(large, 1, theta), torch.where(large, 0, log_theta)
    many = torch.where(large, theta, _LARGE)
    gammas = torch.lgamma(x + few) - torch.lgamma(few)
    log_odds = log_mean - log_few
    below = gammas - few * softplus(log_odds) + x * logsigmoid(log_odds)
    # ln Gamma(x + theta) - ln Gamma(theta) - x ln theta, by Stirling's series.
    growth = (x + many - 0.5) * torch.log1p(x / many) - x + (_stirling(x + many) - _stirling(many))
    above = growth + x * log_mean - (x + many) * torch.log1p(mean / many)
    value = torch.where(large, above, below) - torch.lgamma(x + 1)
    return torch.where(empty, -mean, value)


def _stirling(z: Tensor) -> Tensor:
    """ln Gamma(z) - (z - 1/2) ln z + z - 1/2 ln 2 pi, for z >= 100."""
    t = 1 / z
    return t * (1 / 12 - t * t * (1 / 360 - t * t * (1 / 1260 - t * t / 1680)))


def _negative_binomial_eager(
    x: Tensor, mean: Tensor, theta: Tensor, *, param: str, event: torch.Size
) -> Tensor:
    if param == "mean" and not x.requires_grad:
        return event_total(eager.negative_binomial(x, mean, theta), event)
    return _sum_of(*_negative_binomial_terms(x, mean, theta, param), event)


def _negative_binomial_terms(
    x: Tensor, mean: Tensor, theta: Tensor, param: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Those of which a value is the sum, and those which it lacks; as `eager.negative_binomial`."""
    if param == "log":
        log_mean, mean, theta = mean, torch.exp(mean), torch.exp(theta)
        log_mean = torch.where(_unused(x, mean), 0, log_mean)
    else:
        log_mean = torch.log(torch.where(_unused(x, mean), 1, mean))
    large, small, few, many = eager.sizes(theta)
    above = large * ((x + (many - 0.5)) * torch.log1p(x / many) - x)
    gammas = small * torch.lgamma(x + few)
    powers = x * (log_mean - torch.log(few))
    decay = (x + theta) * torch.log1p(mean / theta)
    return (above, gammas, powers), (torch.lgamma(x + 1), torch.lgamma(few), decay)


@declare(_negative_binomial, eager=_negative_binomial_eager, params=_MEANS)
def negative_binomial_log_prob(
    x: TensorLike,
    mean: TensorLike,
    theta: TensorLike,
    *,
    param: str = "mean",
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """ln of the negative binomial distribution of mean m and inverse dispersion theta.

        ln Gamma(x + theta) - ln Gamma(theta) - ln x!
            + theta ln(theta / (theta + m)) + x ln(m / (theta + m))

    The number of failures before the theta-th success, or a Poisson variable whose rate follows a
    gamma distribution of shape theta: its variance is m + m^2 / theta. The model of counts of
    transcripts in single cells (Lopez et al. 2018, "Deep generative modeling for single-cell
    transcriptomics").

    Args:
        x: counts, of any dtype.
        mean: m, such as library size times softmax.
        theta: often one number for each of the last dimension's genes; its gradient is summed over
            the others in the kernel.
        param: "mean", or "log" where `mean` and `theta` are logarithms.
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: of each element, as in `kl_divergence`: a mask of what is missing.

    Returns:
        Nats, of shape `mean.shape[:-event_ndim]`.
    """
    code = check_param(param, _MEANS)
    operands, shape = tensor_arguments(x=x, mean=mean, theta=theta)
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "param": code,
        "event_ndim": event_dims(event_ndim, len(shape)),
    }


negative_binomial_nll_loss = loss_of(negative_binomial_log_prob)


# ---- Zero-inflated negative binomial -------------------------------------------------------------


def _zero_inflated_negative_binomial(
    x: Tensor, mean: Tensor, theta: Tensor, zero_logits: Tensor, *, param: str
) -> Tensor:
    value = _negative_binomial(x, mean, theta, param=param)
    zero = x == 0
    # ln(s(l) + s(-l) e^-a) = ln(1 - s(-l) (1 - e^-a)), by the latter where that is near 0.
    at_most_0 = torch.where(zero, value, 0)
    some = -torch.sigmoid(-zero_logits) * torch.expm1(at_most_0)
    near = zero & (some < 0.5)
    by_loss = torch.log1p(-torch.where(near, some, 0))
    by_sum = torch.logaddexp(zero_logits, at_most_0) - softplus(zero_logits)
    return torch.where(near, by_loss, torch.where(zero, by_sum, logsigmoid(-zero_logits) + value))


def _zero_inflated_negative_binomial_eager(
    x: Tensor,
    mean: Tensor,
    theta: Tensor,
    zero_logits: Tensor,
    *,
    param: str,
    event: torch.Size,
) -> Tensor:
    if param == "mean" and not x.requires_grad:
        value = eager.negative_binomial(x, mean, theta)
    else:
        plus, minus = _negative_binomial_terms(x, mean, theta, param)
        value = reduce(torch.add, plus) - reduce(torch.add, minus)
    return event_total(eager.zero_inflated(x.detach(), value, zero_logits), event)


@declare(
    _zero_inflated_negative_binomial,
    eager=_zero_inflated_negative_binomial_eager,
    params=_MEANS,
)
def zero_inflated_negative_binomial_log_prob(
    x: TensorLike,
    mean: TensorLike,
    theta: TensorLike,
    zero_logits: TensorLike,
    *,
    param: str = "mean",
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """ln of the negative binomial distribution with an extra zero of probability s(l).

    With s(l) = 1 / (1 + e^-l), and NB as in `negative_binomial_log_prob`,

        x = 0: ln(s(l) + s(-l) NB(0)),     x > 0: ln s(-l) + ln NB(x)

    Args:
        x, mean, theta, param: as in `negative_binomial_log_prob`.
        zero_logits: l, of any size.
        event_ndim: how many trailing dimensions are summed; default all but the first.
        weight: of each element, as in `kl_divergence`: a mask of what is missing.

    Returns:
        Nats, of shape `mean.shape[:-event_ndim]`.
    """
    code = check_param(param, _MEANS)
    operands, shape = tensor_arguments(x=x, mean=mean, theta=theta, zero_logits=zero_logits)
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "param": code,
        "event_ndim": event_dims(event_ndim, len(shape)),
    }


zero_inflated_negative_binomial_nll_loss = loss_of(zero_inflated_negative_binomial_log_prob)
