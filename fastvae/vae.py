"""`VAE`: an encoder, a decoder and the fused ops between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from ._arguments import check_param
from .distributions import DiagonalGaussian

__all__ = ["VAE", "VAEOutput"]


class VAEOutput(NamedTuple):
    """What `VAE.forward` returns, for a batch of B examples; in nats."""

    loss: Tensor
    """0-d: the mean over the batch of beta KL - log-likelihood."""
    log_likelihood: Tensor
    """[B]: ln p(x | z), of which minus is the distortion."""
    kl: Tensor
    """[B]: KL(q(z | x) || p(z)), the rate."""
    z: Tensor
    """The latent sample, of q's shape."""
    mean: Tensor
    """decoder(z), the mean of p(x | z), of x's shape."""


class VAE(nn.Module):
    """A variational autoencoder with a diagonal Gaussian posterior and a Gaussian likelihood.

    With (mu, ln sigma_q^2) = encoder(x) and f = decoder, the model is

        q(z | x) = N(mu, diag(sigma_q^2)),   p(z) = N(0, I),   p(x | z) = N(f(z), sigma^2 I)

    and the loss of one example, with z drawn from q, is in nats

        beta KL(q(z | x) || p(z)) - ln p(x | z)

    whose expectation is minus the ELBO where beta = 1 (Kingma & Welling 2014, "Auto-Encoding
    Variational Bayes"); other beta give the beta-VAE (Higgins et al. 2017).

    Args:
        encoder: any module from x, [B, ...], to one tensor whose halves along `dim` are mu and
            ln sigma_q^2.
        decoder: any module from z, of the shape of mu, to a tensor of x's shape.
        latent_shape: shape of one example's z, or its only size. Needed by `sample`, and checked
            against the encoder where given.
        beta: weight of the KL, at least 0. A plain attribute: set it anew to anneal it.
        sigma: standard deviation of p(x | z), above 0; a plain attribute too.
        dim: the dimension of the encoder's output that holds the two halves.
        param: what the second half is: "logvar", "log_std", "std" or "var".

    Raises:
        ValueError: `beta`, `sigma` or `latent_shape` out of range, or an unknown `param`.

    Example:
        >>> model = VAE(nn.Linear(784, 2 * 16), nn.Linear(16, 784), latent_shape=16, sigma=0.1)
        >>> model(x).loss.backward()
        >>> images = model.sample(64)
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent_shape: int | Sequence[int] | None = None,
        beta: float = 1.0,
        sigma: float = 1.0,
        dim: int = 1,
        param: str = "logvar",
    ) -> None:
        super().__init__()
        check_param(param)
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta is {beta}; want a number of at least 0")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma is {sigma}; want a number above 0")
        if isinstance(latent_shape, int):
            latent_shape = (latent_shape,)
        if latent_shape is not None and any(size < 1 for size in latent_shape):
            raise ValueError(f"latent_shape is {list(latent_shape)}; want sizes above 0")
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = None if latent_shape is None else torch.Size(latent_shape)
        self.beta = beta
        self.sigma = sigma
        self.dim = dim
        self.param = param

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z | x); its `batch_shape` is [B] and its `event_shape` that of one example's z.

        Raises:
            TypeError: the encoder returned something other than one floating-point tensor.
            ValueError: that tensor does not split into halves, or not into ones of `latent_shape`.
        """
        params = self.encoder(x)
        if not isinstance(params, Tensor):
            raise TypeError(
                f"encoder returned a {type(params).__name__}; want one tensor with mu and the "
                f"scale as its halves, such as torch.cat([mu, logvar], dim={self.dim})"
            )
        q = DiagonalGaussian.from_params(params, self.dim, param=self.param)
        if self.latent_shape is not None and q.event_shape != self.latent_shape:
            raise ValueError(
                f"encoder returned shape {list(params.shape)}, a latent_shape of "
                f"{list(q.event_shape)}; want {list(self.latent_shape)}"
            )
        return q

    def decode(self, z: Tensor) -> Tensor:
        """f(z), the mean of p(x | z)."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """f(mu): x through the mode of q(z | x), without noise."""
        return self.decode(self.encode(x).mode)

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """f(z) for n draws of z from the prior N(0, I), without gradients and without the noise of
        p(x | z): [n, ...].

        From one seed, more samples never change the first ones.

        Raises:
            ValueError: the model was made without `latent_shape`.
        """
        if self.latent_shape is None:
            raise ValueError(
                "latent_shape is None; want the shape of one z, as in VAE(..., latent_shape=16)"
            )
        like = next(self.decoder.parameters(), torch.empty(0))  # for its dtype and device
        zeros = like.new_zeros((n, *self.latent_shape))
        return self.decode(functional.rsample(zeros, 0.0, seed=seed, generator=generator))

    def forward(
        self,
        x: Tensor,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> VAEOutput:
        """The loss of a batch, its parts for each example, and what was computed on the way.

        Args:
            x: [B, ...], floating-point.
            seed, generator: where z's noise comes from, as in `fastvae.rsample_kl`.

        Raises:
            TypeError, ValueError: as `encode`.
            ValueError: the decoder's output does not have x's shape.
        """
        z, kl = self.encode(x).rsample_kl(seed=seed, generator=generator)
        mean = self.decode(z)
        if mean.shape != x.shape:  # else it could broadcast, into a wrong loss
            raise ValueError(
                f"decoder returned shape {list(mean.shape)}; want that of x, {list(x.shape)}"
            )
        # Under autocast the decoder's dtype is not x's.
        log_likelihood = functional.gaussian_log_prob(
            x, mean.to(x.dtype), self.sigma, param="std", event_ndim=x.dim() - 1
        )
        loss = (self.beta * kl - log_likelihood).mean()
        return VAEOutput(loss, log_likelihood, kl, z, mean)

    def extra_repr(self) -> str:
        shape = None if self.latent_shape is None else tuple(self.latent_shape)
        return f"latent_shape={shape}, beta={self.beta}, sigma={self.sigma}"
