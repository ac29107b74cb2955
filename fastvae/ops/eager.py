"""Sampling and KL to N(0, I) as nodes of autograd's graph, in plain PyTorch.

For ordinary tensors. Autograd by itself would make a node of every operation, in more passes over
memory, and would find the derivative of e^t - 1 - t by subtraction. What a backward pass that is
itself recorded needs of the intermediate results is computed once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["sample", "sample_and_kl", "standard_kl"]


def sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """mu + e^{logvar / 2} eps, all of one shape."""
    return _Sample.apply(mu, logvar, eps)


def standard_kl(mu: Tensor, logvar: Tensor, dims: int) -> Tensor:
    """1/2 (mu^2 + e^logvar - 1 - logvar), summed over the last `dims` dimensions: never negative,
    and exact to five digits near 0."""
    if mu.shape != logvar.shape:
        mu, logvar = torch.broadcast_tensors(mu, logvar)
    return _StandardKL.apply(mu, logvar, dims)


def sample_and_kl(mu: Tensor, logvar: Tensor, eps: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Both, of tensors of one shape."""
    return _SampleAndKL.apply(mu, logvar, eps, dims)


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
    return (elements.sum(tuple(range(-dims, 0))) if dims else elements).mul_(0.25)


def _of_elements(grad: Tensor, elements: Tensor) -> Tensor:
    """A gradient of sums over the last dimensions, so that it broadcasts."""
    return grad.reshape(grad.shape + (1,) * (elements.dim() - grad.dim()))
