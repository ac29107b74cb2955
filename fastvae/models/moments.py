"""`DiagonalGaussianDistribution`: the posterior of latent diffusion's autoencoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.bounds import Bound
from ..ops.noise import Generators
from .distributions import DiagonalGaussian

__all__ = ["DiagonalGaussianDistribution"]


class DiagonalGaussianDistribution:
    """The interface that latent diffusion's code has for the Gaussian of an encoder's output, as in
    diffusers' `AutoencoderKL` (Rombach et al. 2022), over the fused ops: the name may be imported
    from here instead.

    It differs in this: values of half types are float32 sums; the KL and `nll` are right near
    collapse, and the KL is never negative and sums all dimensions but the first; noise is that of
    `fastvae.rsample`. `DiagonalGaussian` is the distribution as `torch.distributions` has it.

    Args:
        parameters: [B, 2 C, ...], the mean and ln sigma^2 as halves of dimension 1; the second is
            clamped to [-30, 20], with the gradient of a clamp.
        deterministic: the Gaussian is its mean: `std` and `var` are 0, `sample` is the mean, `kl`
            and `nll` are 0.

    Attributes:
        parameters, deterministic: as given.
        mean, logvar, std, var: [B, C, ...], `logvar` clamped.

    Raises:
        TypeError, ValueError: as `DiagonalGaussian.from_params`.

    Example:
        >>> posterior = fastvae.DiagonalGaussianDistribution(encoder(x))
        >>> loss = posterior.kl().mean() + distortion(x, decoder(posterior.sample()))
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters, self.deterministic = parameters, deterministic
        self._gaussian = DiagonalGaussian.from_params(parameters, bound=Bound(-30.0, 20.0))

    @cached_property
    def mean(self) -> Tensor:
        return self._gaussian.mu

    @cached_property
    def logvar(self) -> Tensor:
        return self._gaussian.logvar

    @cached_property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self._gaussian.stddev

    @cached_property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    def sample(self, generator: Generators | None = None) -> Tensor:
        """z = mean + std eps, with gradients.

        Args:
            generator: one, of any device, or a list of as many as examples; by default PyTorch's.
        """
        if self.deterministic:
            return self.mean
        return self._gaussian.rsample(generator=generator)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: Any = None) -> Tensor:
        """KL(self || other) in nats, [B]; `other` is N(0, I) if None. 0, [1], if deterministic.

        Args:
            other: another of these, one of diffusers' own, or a `DiagonalGaussian`. To one that is
                deterministic the divergence is infinite.
        """
        if self.deterministic:
            return torch.zeros(1, device=self.parameters.device)
        if isinstance(other, DiagonalGaussianDistribution):
            p: DiagonalGaussian | None = other._gaussian
        elif other is None or isinstance(other, DiagonalGaussian):
            p = other
        else:
            p = DiagonalGaussian(other.mean, other.logvar)
        kl = self._gaussian.kl(p)
        return torch.full_like(kl, math.inf) if getattr(other, "deterministic", False) else kl

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """-ln N(sample; mean, var) in nats, summed over `dims`. 0, [1], if deterministic."""
        if self.deterministic:
            return torch.zeros(1, device=self.parameters.device)
        ndim = max(sample.dim(), self.mean.dim())
        summed = sorted(range(ndim)[dim] for dim in dims)
        trailing = summed == [*range(ndim - len(summed), ndim)]
        q = self._gaussian
        log_prob = ops.gaussian_log_prob(
            sample, q.mu, q._given, bound=q.bound, event_ndim=len(summed) if trailing else 0
        )
        return -log_prob if trailing else -log_prob.sum(summed)
