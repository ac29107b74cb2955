"""The Gaussian ops as `torch.autograd.Function`s over `torch.ops.fastvae`.

Where a Gaussian's second tensor is None, the first holds both, packed along `packed_dim` (else -1),
and so does its gradient; `bound` is a `Bound` in numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._arguments import PARAMS
from ._autograd import Function, Gradients, bits, find_op, log_prob_backward, recorded, recording
from .bounds import Bound, Numbers

__all__ = [
    "GaussianLogProb",
    "GaussianNLLLoss",
    "KLDivergence",
    "Rsample",
    "RsampleKL",
    "RsampleLogRatio",
]

_rsample = find_op("rsample")
_rsample_backward = find_op("rsample_backward")
_kl_divergence = find_op("kl_divergence")
_kl_divergence_backward = find_op("kl_divergence_backward")
_rsample_kl = find_op("rsample_kl")
_rsample_kl_backward = find_op("rsample_kl_backward")
_rsample_log_ratio = find_op("rsample_log_ratio")
_rsample_log_ratio_backward = find_op("rsample_log_ratio_backward")
_gaussian_log_prob = find_op("gaussian_log_prob")
_gaussian_log_prob_backward = find_op("gaussian_log_prob_backward")
_gaussian_log_prob_with_grad = find_op("gaussian_log_prob_with_grad")
_scale_ = find_op("scale_")


class Rsample(Function):
    """z = mu + sigma eps."""

    op = _rsample

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor | None,
        seed: Tensor,
        param: int,
        packed_dim: int,
        sample_shape: Sequence[int],
        bound: Numbers | None,
    ) -> Tensor:
        ctx.save_for_backward(mu, logvar, seed)
        ctx.settings = param, packed_dim, sample_shape, bound
        return _rsample(mu, logvar, seed, param, packed_dim, sample_shape, bound)

    @staticmethod
    def formula(
        mu: Tensor,
        logvar: Tensor | None,
        seed: Tensor,
        param: int,
        packed_dim: int,
        sample_shape: Sequence[int],
        bound: Numbers | None,
    ) -> Tensor:
        q = _unpacked(packed_dim, mu, logvar)
        return reference.rsample(
            *q, param=PARAMS[param], bound=_bound(bound), sample_shape=sample_shape, seed=seed
        )

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> Gradients:
        mu, logvar, seed = ctx.saved_tensors
        param, packed_dim, sample_shape, bound = ctx.settings
        needs = ctx.needs_input_grad[:2]
        if recording():
            others = seed, *ctx.settings
            grads = recorded(Rsample.formula, (mu, logvar), others, needs, (grad_z,))
        elif logvar is not None and grad_z.shape == mu.shape:
            # dz/dmu is 1: the kernel need not copy.
            grads = _rsample_backward(
                grad_z, mu, logvar, seed, param, packed_dim, sample_shape, bits(needs) & 2, bound
            )
            grads = grad_z if needs[0] else None, grads[1]
        else:
            grads = _rsample_backward(
                grad_z, mu, logvar, seed, param, packed_dim, sample_shape, bits(needs), bound
            )
        return *grads, None, None, None, None, None


class KLDivergence(Function):
    """KL(q || p), p = N(0, I) where the prior's tensors are None."""

    op = _kl_divergence

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        param: int,
        packed_dim: int,
        event_ndim: int,
        bound: Numbers | None,
    ) -> Tensor:
        ctx.save_for_backward(mu, logvar, prior_mu, prior_logvar)
        ctx.settings = param, packed_dim, event_ndim, bound
        return _kl_divergence(
            mu, logvar, prior_mu, prior_logvar, param, packed_dim, event_ndim, bound
        )

    @staticmethod
    def formula(
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        param: int,
        packed_dim: int,
        event_ndim: int,
        bound: Numbers | None,
    ) -> Tensor:
        gaussians = _unpacked(packed_dim, mu, logvar, prior_mu, prior_logvar)
        return reference.kl_divergence(
            *gaussians, param=PARAMS[param], bound=_bound(bound), event_ndim=event_ndim
        )

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> Gradients:
        gaussians = ctx.saved_tensors
        return *_kl_backward(ctx, grad_kl, gaussians, ctx.settings), None, None, None, None


def _kl_backward(
    ctx: Any,
    grad_kl: Tensor,
    gaussians: Sequence[Tensor | None],
    settings: tuple[int, int, int, Numbers | None],
) -> Gradients:
    param, packed_dim, event_ndim, bound = settings
    needs = ctx.needs_input_grad[:4]
    if recording():
        return recorded(KLDivergence.formula, gaussians, settings, needs, (grad_kl,))
    return _kl_divergence_backward(
        grad_kl, *gaussians, param, packed_dim, event_ndim, bits(needs), bound
    )


class RsampleKL(Function):
    """z and KL(q || p) in one pass."""

    op = _rsample_kl

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        seed: Tensor,
        param: int,
        packed_dim: int,
        event_ndim: int,
        bound: Numbers | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mu, logvar, prior_mu, prior_logvar, seed)
        ctx.settings = param, packed_dim, event_ndim, bound
        ctx.set_materialize_grads(False)
        return _rsample_kl(
            mu, logvar, prior_mu, prior_logvar, seed, param, packed_dim, event_ndim, bound
        )

    @staticmethod
    def formula(
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        seed: Tensor,
        param: int,
        packed_dim: int,
        event_ndim: int,
        bound: Numbers | None,
    ) -> tuple[Tensor, Tensor]:
        gaussians = _unpacked(packed_dim, mu, logvar, prior_mu, prior_logvar)
        return reference.rsample_kl(
            *gaussians, param=PARAMS[param], bound=_bound(bound), event_ndim=event_ndim, seed=seed
        )

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> Gradients:
        *gaussians, seed = ctx.saved_tensors
        param, packed_dim, event_ndim, bound = ctx.settings
        needs = ctx.needs_input_grad[:4]
        nothing = None, None, None, None
        if recording():
            others = seed, *ctx.settings
            grads = recorded(RsampleKL.formula, gaussians, others, needs, (grad_z, grad_kl))
        elif grad_z is not None and grad_kl is not None:
            grads = _rsample_kl_backward(
                grad_z,
                grad_kl,
                *gaussians,
                seed,
                param,
                packed_dim,
                event_ndim,
                bits(needs),
                bound,
            )
        elif grad_kl is not None:
            grads = _kl_backward(ctx, grad_kl, gaussians, ctx.settings)
        elif grad_z is not None:
            q = _rsample_backward(
                grad_z, *gaussians[:2], seed, param, packed_dim, (), bits(needs[:2]), bound
            )
            grads = *q, None, None
        else:
            grads = nothing
        return *grads, *nothing, None


class RsampleLogRatio(Function):
    """z and ln p(z) - ln q(z) in one pass."""

    op = _rsample_log_ratio

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        seed: Tensor,
        param: int,
        packed_dim: int,
        event_ndim: int,
        sample_shape: Sequence[int],
        path_derivative: bool,
        bound: Numbers | None,
    ) -> tuple[Tensor, Tensor]:
        gaussians = mu, logvar, prior_mu, prior_logvar
        ctx.save_for_backward(*gaussians, seed)
        ctx.settings = param, packed_dim, event_ndim, sample_shape, path_derivative, bound
        return _rsample_log_ratio(*gaussians, seed, *ctx.settings)

    @staticmethod
    def formula(
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        seed: Tensor,
        param: int,
        packed_dim: int,
        event_ndim: int,
        sample_shape: Sequence[int],
        path_derivative: bool,
        bound: Numbers | None,
    ) -> tuple[Tensor, Tensor]:
        gaussians = _unpacked(packed_dim, mu, logvar, prior_mu, prior_logvar)
        return reference.rsample_log_ratio(
            *gaussians,
            param=PARAMS[param],
            bound=_bound(bound),
            event_ndim=event_ndim,
            sample_shape=sample_shape,
            path_derivative=path_derivative,
            seed=seed,
        )

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_log_ratio: Tensor) -> Gradients:
        *gaussians, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        *settings, bound = ctx.settings
        upstream = grad_z, grad_log_ratio
        if recording():
            others = seed, *ctx.settings
            grads = recorded(RsampleLogRatio.formula, gaussians, others, needs, upstream)
        else:
            grads = _rsample_log_ratio_backward(
                *upstream, *gaussians, seed, *settings, bits(needs), bound
            )
        return *grads, None, None, None, None, None, None, None


class GaussianLogProb(Function):
    """log N(x; mean, sigma^2); without a tensor `logvar`, the number `scale` stands for it."""

    op = _gaussian_log_prob

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        scale: float,
        param: int,
        event_ndim: int,
        bound: Numbers | None,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, logvar)
        ctx.settings = scale, param, event_ndim, bound
        return _gaussian_log_prob(x, mean, logvar, scale, param, event_ndim, bound)

    @staticmethod
    def formula(
        x: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        scale: float,
        param: int,
        event_ndim: int,
        bound: Numbers | None,
    ) -> Tensor:
        return reference.gaussian_log_prob(
            x,
            mean,
            scale if logvar is None else logvar,
            param=PARAMS[param],
            bound=_bound(bound),
            event_ndim=event_ndim,
        )

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor) -> Gradients:
        op, formula = _gaussian_backward, GaussianLogProb.formula
        return *log_prob_backward(ctx, op, formula, grad_log_prob), None, None, None, None


def _gaussian_backward(grad_log_prob: Tensor, *arguments: Any) -> Gradients:
    *others, bound, needs = arguments
    return _gaussian_log_prob_backward(grad_log_prob, *others, needs, bound)


class GaussianNLLLoss(Function):
    """`-weight` times the sum of all log N(x; mean, sigma^2), with its gradients made in forward.

    Backward multiplies them by the upstream gradient in place, and does nothing where that is 1; on
    a GPU the device finds out. They are given away with that, so a second backward pass through the
    same graph computes them as `GaussianLogProb` does.
    """

    op = None

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        scale: float,
        param: int,
        event_ndim: int,
        bound: Numbers | None,
        rows: torch.Size,
        weight: float,
    ) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        grad = torch.full((), -weight, dtype=dtype, device=x.device).expand(rows)
        log_prob, *grads = _gaussian_log_prob_with_grad(
            grad, x, mean, logvar, scale, param, event_ndim, bits(ctx.needs_input_grad[:3]), bound
        )
        ctx.save_for_backward(x, mean, logvar)
        ctx.settings = scale, param, event_ndim, bound
        ctx.grad, ctx.grads = grad, grads
        return -weight * log_prob.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Gradients:
        grads, ctx.grads = ctx.grads, None
        if grads is None or recording():
            op, formula = _gaussian_backward, GaussianLogProb.formula
            grads = log_prob_backward(ctx, op, formula, grad_loss * ctx.grad)
        else:
            for gradient in grads:
                if gradient is not None:
                    _multiply_(gradient, grad_loss)
        return *grads, None, None, None, None, None, None


def _multiply_(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies in place, unless by 1; never waits for a device."""
    if gradient.is_cuda:
        _scale_(gradient, factor)
    elif factor != 1:
        gradient.mul_(factor)


def _bound(numbers: Numbers | None) -> Bound | None:
    return None if numbers is None else Bound.from_numbers(numbers)


def _unpacked(packed_dim: int, *gaussians: Tensor | None) -> list[Tensor]:
    tensors: list[Tensor] = []
    for t in gaussians:
        if t is not None:
            tensors.extend(t.chunk(2, packed_dim) if packed_dim >= 0 else (t,))
    return tensors
