"""Gaussian likelihoods: sigma fixed, learned, from the decoder, or optimal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.bounds import Bound
from .base import Likelihood, check_positive

__all__ = [
    "Gaussian",
    "HeteroscedasticGaussian",
    "LearnedGaussian",
    "OptimalGaussian",
]


class _Gaussian(Likelihood):
    """N(m, sigma^2): subclasses give ln sigma^2 by `_logvar`, from the parts behind the mean."""

    bound: Bound | None = None

    def _logvar(self, mean: Tensor, *others: Tensor) -> Tensor:
        raise NotImplementedError

    def _bounded(self, logvar: Tensor) -> Tensor:
        return logvar if self.bound is None else self.bound(logvar)

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return self._log_prob_with(self._logvar(*parts), x, parts[0])

    def _log_prob_with(self, logvar: Tensor, x: Tensor, mean: Tensor) -> Tensor:
        return ops.gaussian_log_prob(
            x, mean, logvar.to(x.dtype), bound=self.bound, event_ndim=x.dim() - 1
        )

    def _mean(self, *parts: Tensor, **context: Any) -> Tensor:
        return parts[0]

    def _sample(self, eps: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        return parts[0] + torch.exp(0.5 * self._bounded(self._logvar(*parts))) * eps[0]

    def extra_repr(self) -> str:
        return "" if self.bound is None else f"bound={self.bound}"


class Gaussian(_Gaussian):
    """N(f(z), sigma^2 I) with a fixed sigma: squared error over 2 sigma^2, plus a constant.

    With sigma = 1 and the KL weighted by beta, the objective is beta times that of sigma^2 = beta
    and the KL unweighted, up to a constant.

    Args:
        sigma: standard deviation, above 0; a plain attribute: set it anew to anneal it.

    Raises:
        ValueError: `sigma` out of range.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.sigma = check_positive("sigma", sigma)

    def _log_prob(
        self, x: Tensor, *parts: Tensor, **context: Any
    ) -> Tensor:  # a number: no tensor is made
        return ops.gaussian_log_prob(x, parts[0], self.sigma, param="std", event_ndim=x.dim() - 1)

    def _logvar(self, mean: Tensor, *others: Tensor) -> Tensor:
        return mean.new_full((), 2 * math.log(self.sigma))

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"


class LearnedGaussian(_Gaussian):
    """N(f(z), sigma^2) with ln sigma^2 a parameter of the model, the same for every example.

    Args:
        shape: of ln sigma^2, which broadcasts to one example: () for one scalar, (C, 1, 1) for one
            a channel, the example's own for one a pixel.
        sigma: initial standard deviation, above 0.
        bound: of ln sigma^2; without a floor, pixels that can be fitted exactly drive it to minus
            infinity.

    Raises:
        ValueError: `sigma` out of range.
    """

    def __init__(
        self, shape: Sequence[int] = (), *, sigma: float = 1.0, bound: Bound | None = None
    ) -> None:
        super().__init__()
        self.logvar = nn.Parameter(
            torch.full(tuple(shape), 2 * math.log(check_positive("sigma", sigma)))
        )
        self.bound = bound

    def _logvar(self, mean: Tensor, *others: Tensor) -> Tensor:
        return self.logvar


class HeteroscedasticGaussian(_Gaussian):
    """N(f(z), sigma(z)^2): the decoder gives the mean and ln sigma^2 of every pixel.

    Args:
        bound: of ln sigma^2; without a floor, pixels that can be fitted exactly drive it to minus
            infinity.
    """

    outputs = 2

    def __init__(self, bound: Bound | None = None) -> None:
        super().__init__()
        self.bound = bound

    def _logvar(self, mean: Tensor, *others: Tensor) -> Tensor:
        return others[0]


class OptimalGaussian(_Gaussian):
    """N(f(z), sigma^2 I) at the sigma that is best for the batch, sigma^2 = MSE (Rybkin et al.
    2021, "Simple and effective VAE training with calibrated decoders").

    The negative log-likelihood of a batch of N numbers is then (N/2) ln(2 pi e MSE). While
    training, the MSE is that of the batch and all samples of z, and an average is kept of the
    batches whose gradients are recorded, as in `nn.BatchNorm1d`; in evaluation mode that average is
    sigma^2, so that the density of one example does not depend on others.

    Args:
        through_sigma: let the gradient through the MSE. In the batch's mean log-likelihood that
            changes nothing, for at its optimum the derivative by sigma is 0 (the envelope
            theorem); it does where examples or samples have unequal weights, as in IWAE.
        momentum: of the average.
        bound: of ln sigma^2.
    """

    mse: Tensor
    batches: Tensor

    def __init__(
        self, *, through_sigma: bool = False, momentum: float = 0.1, bound: Bound | None = None
    ) -> None:
        super().__init__()
        self.through_sigma = through_sigma
        self.momentum = momentum
        self.bound = bound
        self.register_buffer("mse", torch.ones(()))
        self.register_buffer("batches", torch.zeros(()))

    def _log_prob(self, x: Tensor, *parts: Tensor, **context: Any) -> Tensor:
        if not self.training:
            return super()._log_prob(x, *parts)
        # Of half types, whose squares are out of their range.
        difference = (x - parts[0]).to(torch.promote_types(x.dtype, torch.float32))
        mse = difference.square().mean()
        if torch.is_grad_enabled():
            self._keep(mse.detach().to(self.mse.dtype))
        logvar = torch.log(mse if self.through_sigma else mse.detach())
        return self._log_prob_with(logvar, x, parts[0])

    def _keep(self, mse: Tensor) -> None:
        """In the average, unless it is NaN or infinite, which would stay there for good."""
        finite = mse.isfinite()
        self.batches += finite
        weight = (1 / self.batches.clamp(min=1)).clamp(min=self.momentum)
        self.mse.copy_(torch.where(finite, self.mse.lerp(mse, weight), self.mse))

    def _logvar(self, mean: Tensor, *others: Tensor) -> Tensor:
        return torch.log(self.mse)
