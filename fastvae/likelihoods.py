"""Likelihoods p(x | z): what a decoder's output means.

Every likelihood is a module with the same three methods. It reads its parameters from the decoder's
output, which has `outputs` numbers for each element of x: its dimension 1 is `outputs` times as
long as x's, as if the parameters were concatenated along it. What a likelihood learns itself (a
sigma) is trained with the rest of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional
from .bounds import Bound

__all__ = [
    "Gaussian",
    "HeteroscedasticGaussian",
    "LearnedGaussian",
    "Likelihood",
    "OptimalGaussian",
    "check_positive",
]


class Likelihood(nn.Module):
    """Elements that are independent given z.

    A subclass says how one is distributed, by `_log_prob`, `_mean` and `_sample`; each gets the
    `outputs` parts of the decoder's output, of x's shape.
    """

    outputs: int = 1
    """How many numbers of the decoder's output belong to one element of x."""
    draws: int = 1
    """How many normals it takes to sample one element."""

    def log_prob(self, x: Tensor, decoded: Tensor) -> Tensor:
        """ln p(x | z) in nats.

        Args:
            x: [B, C, ...].
            decoded: the decoder's output, [B, outputs * C, ...]; dimensions in front of these, such
                as samples of z, are kept.

        Returns:
            [B], or [..., B]; float32 for half types.

        Raises:
            ValueError: `decoded` does not have that shape.
        """
        want = [x.shape[0], self.outputs * x.shape[1], *x.shape[2:]] if x.dim() > 1 else [*x.shape]
        if list(decoded.shape[decoded.dim() - x.dim() :]) != want:
            rule = f", {self.outputs} times as long in dimension 1" if self.outputs > 1 else ""
            raise ValueError(
                f"decoder returned shape {list(decoded.shape)}; want that of x{rule}, {want}"
            )
        if x.is_floating_point():
            decoded = decoded.to(x.dtype)  # under autocast it is not x's
        return self._log_prob(x, *self._parts(decoded, x.dim()))

    def mean(self, decoded: Tensor) -> Tensor:
        """E[x | z], [B, C, ...], from the decoder's output [B, outputs * C, ...]."""
        return self._mean(*self._parts(decoded, decoded.dim()))

    @torch.no_grad()
    def sample(
        self,
        decoded: Tensor,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x ~ p(x | z), [B, C, ...], without gradients; noise as in `fastvae.rsample`."""
        parts = self._parts(decoded, decoded.dim())
        zeros = torch.zeros_like(parts[0], dtype=torch.float64)
        eps = functional.rsample(
            zeros, 0.0, sample_shape=(self.draws,), seed=seed, generator=generator
        )
        return self._sample(eps, *(part.double() for part in parts)).to(decoded.dtype)

    def _parts(self, decoded: Tensor, ndim: int) -> tuple[Tensor, ...]:
        """Views; `ndim` is x's number of dimensions."""
        return decoded.chunk(self.outputs, 1 - ndim) if self.outputs > 1 else (decoded,)

    def _log_prob(self, x: Tensor, *parts: Tensor) -> Tensor:
        raise NotImplementedError

    def _mean(self, *parts: Tensor) -> Tensor:
        raise NotImplementedError

    def _sample(self, eps: Tensor, *parts: Tensor) -> Tensor:
        """From normals `eps`, [draws, B, C, ...]; in float64."""
        raise NotImplementedError


# ---- Gaussian: where sigma comes from ------------------------------------------------------------


class _Gaussian(Likelihood):
    """N(m, sigma^2): subclasses give ln sigma^2 by `_logvar`, from the parts behind the mean."""

    bound: Bound | None = None

    def _logvar(self, mean: Tensor, *others: Tensor) -> Tensor:
        raise NotImplementedError

    def _bounded(self, logvar: Tensor) -> Tensor:
        return logvar if self.bound is None else self.bound(logvar)

    def _log_prob(self, x: Tensor, *parts: Tensor) -> Tensor:
        return self._log_prob_with(self._logvar(*parts), x, parts[0])

    def _log_prob_with(self, logvar: Tensor, x: Tensor, mean: Tensor) -> Tensor:
        return functional.gaussian_log_prob(
            x, mean, logvar.to(x.dtype), bound=self.bound, event_ndim=x.dim() - 1
        )

    def _mean(self, *parts: Tensor) -> Tensor:
        return parts[0]

    def _sample(self, eps: Tensor, *parts: Tensor) -> Tensor:
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

    def _log_prob(self, x: Tensor, *parts: Tensor) -> Tensor:  # a number: no tensor is made
        return functional.gaussian_log_prob(
            x, parts[0], self.sigma, param="std", event_ndim=x.dim() - 1
        )

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
    training, the MSE is that of the batch and all samples of z, and an average over batches is
    kept, as in `nn.BatchNorm1d`; in evaluation mode that average is sigma^2, so that the density of
    one example does not depend on others.

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

    def _log_prob(self, x: Tensor, *parts: Tensor) -> Tensor:
        if not self.training:
            return super()._log_prob(x, *parts)
        mse = (x - parts[0]).square().mean(dtype=torch.promote_types(x.dtype, torch.float32))
        with torch.no_grad():
            self.batches += 1
            weight = (1 / self.batches).clamp(min=self.momentum)
            self.mse.lerp_(mse.to(self.mse.dtype), weight)
        logvar = torch.log(mse if self.through_sigma else mse.detach())
        return self._log_prob_with(logvar, x, parts[0])

    def _logvar(self, mean: Tensor, *others: Tensor) -> Tensor:
        return torch.log(self.mse)


def check_positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; want a number above 0")
    return value
