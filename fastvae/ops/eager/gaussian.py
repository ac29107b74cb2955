"""KL divergences of Gaussians, with a sample or without, and their log-probability."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from ..elements import precision, sum_last
from ..graph import recorded, recording

__all__ = ["gaussian_log_prob", "kl", "not_negative", "sample_and_kl", "standard_kl"]


def standard_kl(mu: Tensor, logvar: Tensor, dims: int) -> Tensor:
    """1/2 (mu^2 + e^logvar - 1 - logvar), summed over the last `dims` dimensions: never negative,
    and exact to five digits near 0."""
    if mu.shape != logvar.shape:
        mu, logvar = torch.broadcast_tensors(mu, logvar)
    return _StandardKL.apply(mu, logvar, dims)


def kl(
    define: Callable[..., Tensor],
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    dims: int,
    balance: float | None = None,
) -> Tensor:
    """1/2 (w^2 + e^d - 1 - d), d = logvar - prior_logvar, w = (mu - prior_mu) / sigma_p, of tensors
    of one shape; as exact. With a `balance`, that is the prior's share of the gradient. A backward
    pass that is itself recorded goes through the definition, element by element."""
    return _KL.apply(define, mu, logvar, prior_mu, prior_logvar, dims, balance)


def sample_and_kl(mu: Tensor, logvar: Tensor, eps: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """mu + e^{logvar / 2} eps and `standard_kl`, of tensors of one shape."""
    return _SampleAndKL.apply(mu, logvar, eps, dims)


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor, dims: int) -> Tensor:
    """-1/2 ((x - mean)^2 e^-logvar + logvar + ln 2 pi), summed over the last `dims` dimensions, of
    tensors of one shape."""
    return _GaussianLogProb.apply(x, mean, logvar, dims)


def not_negative(sigma: Tensor) -> Tensor:
    """NaN below 0, as a logarithm is."""
    return sigma + sigma.detach().clamp(max=0).sqrt_()


class _StandardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, dims: int) -> Tensor:
        tail = _exp_tail(logvar)
        ctx.save_for_backward(mu, logvar, tail)
        return _kl(mu, tail, dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        mu, logvar, tail = ctx.saved_tensors
        grad = _of_elements(grad, mu)
        return grad * mu, _growth(logvar, tail) * (0.5 * grad), None


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.define, *qp, ctx.dims, ctx.balance = arguments
        mu, logvar, prior_mu, prior_logvar = qp
        inverse, difference = precision(0.5 * prior_logvar), logvar - prior_logvar
        w, tail = (mu - prior_mu).mul_(inverse), _exp_tail(difference)
        ctx.save_for_backward(*qp, inverse, w, tail + difference)
        return _kl(w, tail, ctx.dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *qp, inverse, w, growth = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:5]
        if recording():
            found = recorded(lambda *qp: sum_last(ctx.define(*qp), ctx.dims), qp, needs, [grad])
            return None, *found, None, None
        grad, (to_q, to_p) = _of_elements(grad, w), _shares(ctx.balance)
        by_mu = w * inverse * grad
        by_logvar = growth * (0.5 * grad)
        by_prior_logvar = None
        if needs[3]:
            by_prior_logvar = (w * w * (-0.5 * to_p * grad)).sub(by_logvar, alpha=to_p)
        return (
            None,
            _times(by_mu, to_q) if needs[0] else None,
            _times(by_logvar, to_q) if needs[1] else None,
            by_mu * -to_p if needs[2] else None,
            by_prior_logvar,
            None,
            None,
        )


def _shares(balance: float | None) -> tuple[float, float]:
    """Of the gradient, q's and p's."""
    return (1.0, 1.0) if balance is None else (1 - balance, balance)


def _times(t: Tensor, share: float) -> Tensor:
    return t if share == 1 else t * share


class _SampleAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, logvar: Tensor, eps: Tensor, dims: int
    ) -> tuple[Tensor, Tensor]:
        step = torch.mul(logvar, 0.5).exp_().mul_(eps)
        tail = _exp_tail(logvar)
        ctx.save_for_backward(mu, logvar, tail, eps, step)
        return mu + step, _kl(mu, tail, dims)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None, None]:
        mu, logvar, tail, eps, step = ctx.saved_tensors
        if torch.is_grad_enabled():
            step = torch.exp(0.5 * logvar) * eps
        grad_kl = _of_elements(grad_kl, mu)
        by_logvar = torch.addcmul(grad_z * step, _growth(logvar, tail), grad_kl)
        return torch.addcmul(grad_z, grad_kl, mu), 0.5 * by_logvar, None, None


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


def _near(t: Tensor) -> float:
    """The series' next term, below this, and the rounding of e^t - 1, above it, are less than 1e-5
    of e^t - 1 - t in float32."""
    return (12 * torch.finfo(t.dtype).eps) ** (1 / 3)


def _exp_tail(t: Tensor) -> Tensor:
    """e^t - 1 - t."""
    far = hardshrink(t, _near(t))  # 0 where t is near 0, else t
    near = t - far
    square = near * near
    tail = torch.expm1(far).sub_(far)
    return tail.add_(square.addcmul_(square, near, value=1 / 3), alpha=0.5)


def _growth(t: Tensor, tail: Tensor) -> Tensor:
    """e^t - 1, of `_exp_tail`."""
    return torch.expm1(t) if torch.is_grad_enabled() else tail + t


def _kl(w: Tensor, tail: Tensor, dims: int) -> Tensor:
    return sum_last(torch.addcmul(tail, w, w), dims).mul_(0.5)


def _of_elements(grad: Tensor, elements: Tensor) -> Tensor:
    """A gradient of sums over the last dimensions, so that it broadcasts."""
    return grad.reshape(grad.shape + (1,) * (elements.dim() - grad.dim()))
