"""What eager formulas are made of, as nodes of autograd's graph, in plain PyTorch.

For ordinary tensors. Autograd by itself would make a node of every operation, in more passes over
memory, and would find the derivative of e^t - 1 - t by subtraction. What a backward pass that is
itself recorded needs of the intermediate results is computed once more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .elements import precision, sum_last

__all__ = [
    "discretized_logistic",
    "gaussian_log_prob",
    "kl",
    "negative_binomial",
    "poisson",
    "sample",
    "sample_and_kl",
    "sizes",
    "standard_kl",
]


def sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """mu + e^{logvar / 2} eps, all of one shape."""
    return _Sample.apply(mu, logvar, eps)


def standard_kl(mu: Tensor, logvar: Tensor, dims: int) -> Tensor:
    """1/2 (mu^2 + e^logvar - 1 - logvar), summed over the last `dims` dimensions: never negative,
    and exact to five digits near 0."""
    if mu.shape != logvar.shape:
        mu, logvar = torch.broadcast_tensors(mu, logvar)
    return _StandardKL.apply(mu, logvar, dims)


def kl(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor, dims: int) -> Tensor:
    """1/2 (w^2 + e^d - 1 - d), d = logvar - prior_logvar, w = (mu - prior_mu) / sigma_p, of tensors
    of one shape; as exact."""
    return _KL.apply(mu, logvar, prior_mu, prior_logvar, dims)


def sample_and_kl(mu: Tensor, logvar: Tensor, eps: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Both, of tensors of one shape."""
    return _SampleAndKL.apply(mu, logvar, eps, dims)


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor, dims: int) -> Tensor:
    """-1/2 ((x - mean)^2 e^-logvar + logvar + ln 2 pi), summed over the last `dims` dimensions, of
    tensors of one shape."""
    return _GaussianLogProb.apply(x, mean, logvar, dims)


_LARGE = 300.0
"""From this theta on, Stirling's series behind its leading terms is below 1e-6 x."""


def poisson(x: Tensor, rate: Tensor) -> Tensor:
    """x ln(rate) - rate - ln x!, which broadcast; x has no gradient."""
    return _Poisson.apply(x, rate)


def negative_binomial(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """ln Gamma(x + theta) - ln Gamma(theta) - ln x! + x ln(mean / theta) - (x + theta) ln(1 + mean
    / theta), which broadcast; x has no gradient."""
    return _NegativeBinomial.apply(x, mean, theta)


def discretized_logistic(
    x: Tensor, mean: Tensor, log_scale: Tensor, width: float, low: float, high: float
) -> Tensor:
    """ln of a logistic distribution's probability of a bin of `width` around x, and of all beyond
    the bins of `low` and `high`; all broadcast."""
    return _DiscretizedLogistic.apply(x, mean, log_scale, width, low, high)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        step = _step(logvar, eps)
        ctx.save_for_backward(logvar, eps, step)
        return mu + step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, _by_logvar(grad, *ctx.saved_tensors), None


class _StandardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, dims: int) -> Tensor:
        growth = torch.expm1(logvar)
        ctx.save_for_backward(mu, logvar, growth)
        return _kl(mu, logvar, growth, dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        mu, logvar, growth = ctx.saved_tensors
        if torch.is_grad_enabled():
            growth = torch.expm1(logvar)
        grad = _of_elements(grad, mu)
        return grad * mu, 0.5 * grad * growth, None


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Tensor:
        *qp, dims = tensors
        difference, growth, inverse, w = _to_prior(*qp)
        ctx.save_for_backward(*qp, growth, inverse, w)
        return _kl(w, difference, growth, dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *qp, growth, inverse, w = ctx.saved_tensors
        if torch.is_grad_enabled():
            _, growth, inverse, w = _to_prior(*qp)
        half = 0.5 * _of_elements(grad, w)
        by_w, by_logvar = (2 * half) * w, half * growth
        by_mu = by_w * inverse
        return by_mu, by_logvar, -by_mu, torch.addcmul(-by_logvar, by_w, w, value=-0.5), None


def _to_prior(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q in units of p: d, e^d - 1, 1 / sigma_p, w."""
    difference, inverse = logvar - prior_logvar, precision(0.5 * prior_logvar)
    return difference, torch.expm1(difference), inverse, (mu - prior_mu) * inverse


class _SampleAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, logvar: Tensor, eps: Tensor, dims: int
    ) -> tuple[Tensor, Tensor]:
        step, growth = _step(logvar, eps), torch.expm1(logvar)
        ctx.save_for_backward(mu, logvar, growth, eps, step)
        return mu + step, _kl(mu, logvar, growth, dims)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None, None]:
        mu, logvar, growth, eps, step = ctx.saved_tensors
        if torch.is_grad_enabled():
            growth = torch.expm1(logvar)
        grad_kl = _of_elements(grad_kl, mu)
        by_logvar = _by_logvar(grad_z, logvar, eps, step)
        return (
            torch.addcmul(grad_z, grad_kl, mu),
            torch.addcmul(by_logvar, grad_kl, growth, value=0.5),
            None,
            None,
        )


class _GaussianLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, logvar: Tensor, dims: int) -> Tensor:
        inverse = precision(0.5 * logvar)
        w = torch.sub(x, mean).mul_(inverse)
        ctx.save_for_backward(x, mean, logvar, inverse, w)
        elements = torch.addcmul(logvar, w, w)
        total = sum_last(elements, dims)
        size = x.numel() / max(total.numel(), 1)
        return torch.rsub(total, -0.5 * size * math.log(2 * math.pi), alpha=0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, mean, logvar, inverse, w = ctx.saved_tensors
        if torch.is_grad_enabled():
            inverse = precision(0.5 * logvar)
            w = (x - mean) * inverse
        grad = _of_elements(grad, x)
        by_w = grad * w
        by_mean = by_w * inverse
        by_logvar = torch.addcmul(-0.5 * grad, by_w, w, value=0.5)
        return -by_mean if ctx.needs_input_grad[0] else None, by_mean, by_logvar, None


class _Poisson(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: Tensor) -> Tensor:
        ctx.save_for_backward(x, rate)
        return _unless_unused(x, rate).log_().mul_(x).sub_(rate).sub_((x + 1).lgamma_())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        x, rate = ctx.saved_tensors
        return None, (x / _above_0(rate)).sub(1).mul(grad).sum_to_size(rate.shape)


class _NegativeBinomial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
        large, few, many = sizes(theta)
        growth, decay = torch.log1p(x / many), torch.log1p(mean / theta)
        ctx.save_for_backward(x, mean, theta, growth, decay)
        above = (x + (many - 0.5)).mul_(growth).sub_(x)
        value = torch.where(large, above, (x + few).lgamma_())
        value.sub_(torch.lgamma(few)).sub_((x + 1).lgamma_())
        value = torch.addcmul(value, x, _unless_unused(x, mean).log_() - torch.log(few))
        return value.addcmul_(x + theta, decay, value=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        x, mean, theta, growth, decay = ctx.saved_tensors
        large, few, many = sizes(theta)
        if torch.is_grad_enabled():
            growth, decay = torch.log1p(x / many), torch.log1p(mean / theta)
        share = (x + theta) / (theta + mean)
        by_mean = (x / _above_0(mean) - share).mul(grad).sum_to_size(mean.shape)
        if not ctx.needs_input_grad[2]:
            return None, by_mean, None
        above = growth - (x / many) * (x + (many - 0.5)) / (x + many)
        below = torch.digamma(x + few) - torch.digamma(few) - x / few
        by_theta = torch.where(large, above, below) - decay + share * (mean / theta)
        return None, by_mean, (grad * by_theta).sum_to_size(theta.shape)


def sizes(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where theta is large; theta where it is not, and where it is, else any such number."""
    large = theta > _LARGE
    return large, torch.where(large, 1, theta), torch.where(large, theta, _LARGE)


def _unless_unused(x: Tensor, mean: Tensor) -> Tensor:
    """The mean, but for x = 0, where nothing asks for its logarithm."""
    return torch.where(x == 0, 1, mean)


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
        first, last = x < low + width / 2, x > high - width / 2
        inverse, upper, lower = _ends(x, mean, log_scale, width)
        ctx.save_for_backward(x, mean, log_scale, first, last, inverse, upper, lower)
        ctx.width = width
        log_above, log_below = logsigmoid(upper * inverse), logsigmoid(lower * inverse)
        inside = (log_above + log_below).add_(_log_decay(width * inverse, log_scale, width))
        return torch.where(first, log_above, torch.where(last, log_below, inside))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, log_scale, first, last, inverse, upper, lower = ctx.saved_tensors
        if torch.is_grad_enabled():
            inverse, upper, lower = _ends(x, mean, log_scale, ctx.width)
        by_above = torch.where(last, 0, grad * torch.sigmoid(-upper * inverse))
        by_below = torch.where(first, 0, grad * torch.sigmoid(-lower * inverse))
        by_x = (by_above - by_below) * inverse
        by_mean = -by_x.sum_to_size(mean.shape)
        by_x = by_x.sum_to_size(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return by_x, by_mean, None, None, None, None
        t = (ctx.width * inverse).clamp(min=torch.finfo(grad.dtype).tiny)  # t / (e^t - 1) is 1
        by_decay = torch.where(first | last, 0, grad * (t / torch.expm1(t)))
        by_log_scale = -(by_above * upper + by_below * lower) * inverse - by_decay
        return by_x, by_mean, by_log_scale.sum_to_size(log_scale.shape), None, None, None


def _ends(
    x: Tensor, mean: Tensor, log_scale: Tensor, width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """1 / scale, and how far the mean is below the upper end of a bin and above its lower one."""
    difference = x - mean
    return precision(log_scale), width / 2 + difference, width / 2 - difference


def _log_decay(t: Tensor, log_scale: Tensor, width: float) -> Tensor:
    """ln(1 - e^-t) as far as rounding: below the limit it is ln t - t / 2."""
    small = t < (24 * torch.finfo(t.dtype).eps) ** 0.5
    near = torch.sub(math.log(width) - log_scale, t, alpha=0.5)
    return torch.where(small, near, torch.log(-torch.expm1(-torch.where(small, 1, t))))


def _above_0(mean: Tensor) -> Tensor:
    """By which 0 can be divided."""
    return mean.clamp(min=torch.finfo(mean.dtype).tiny)


def _step(logvar: Tensor, eps: Tensor) -> Tensor:
    return torch.mul(logvar, 0.5).exp_().mul_(eps)


def _by_logvar(grad: Tensor, logvar: Tensor, eps: Tensor, step: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        step = torch.exp(0.5 * logvar) * eps
    return torch.mul(grad, step).mul_(0.5)


def _kl(mu: Tensor, logvar: Tensor, growth: Tensor, dims: int) -> Tensor:
    # Twice e^t - 1 - t. The series' next term, below the limit, and the rounding of e^t - 1, above
    # it, are less than 1e-5 of the value in float32.
    square = logvar * logvar
    near = torch.addcmul(square, square, logvar, value=1 / 3)
    far = torch.sub(growth, logvar).mul_(2)
    limit = (12 * torch.finfo(logvar.dtype).eps) ** (2 / 3)
    elements = torch.where(square < limit, near, far).addcmul_(mu, mu, value=2)
    return sum_last(elements, dims).mul_(0.25)


def _of_elements(grad: Tensor, elements: Tensor) -> Tensor:
    """A gradient of sums over the last dimensions, so that it broadcasts."""
    return grad.reshape(grad.shape + (1,) * (elements.dim() - grad.dim()))
