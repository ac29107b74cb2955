"""`ProbabilisticPCA`: a latent-variable model whose every answer is known exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from .likelihoods import Gaussian
from .vae import VAE

__all__ = ["ProbabilisticPCA"]


class ProbabilisticPCA:
    """x = W z + m + sigma eps at its maximum likelihood (Tipping & Bishop 1999): the best that a
    VAE with a linear decoder can be (Lucas et al. 2019, "Don't blame the ELBO!").

    With the eigenvalues l_1 >= l_2 >= ... and eigenvectors u_i of the data's covariance (divided by
    N), sigma^2 is the mean of all but the first k, and column i of W is
    (l_i - sigma^2)^{1/2} u_i. Its posterior is a diagonal Gaussian with the variances
    sigma^2 / l_i, and averaged over the data, in nats,

        rate = 1/2 sum_i ln(l_i / sigma^2)
        distortion = D/2 ln(2 pi e sigma^2)
        rate + distortion = -mean ln p(x)

    Args:
        x: [N, D], N above D.
        k: size of the latent, below D.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, x: Tensor, k: int) -> None:
        if x.dim() != 2 or len(x) <= x.shape[1]:
            raise ValueError(f"x has shape {list(x.shape)}; want [N, D] with N above D")
        if not 0 < k < x.shape[1]:
            raise ValueError(f"k is {k}; want 1 to {x.shape[1] - 1}")
        x = x.double()
        self.mean = x.mean(0)
        centred = x - self.mean
        eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        self.eigenvalues = eigenvalues.flip(0)
        self.directions = vectors.flip(1)[:, :k]
        """u_1 ... u_k, [D, k]."""
        self.variance = self.eigenvalues[k:].mean()
        """sigma^2."""
        self.weight = self.directions * (self.eigenvalues[:k] - self.variance).sqrt()
        """W, [D, k]."""
        size = x.shape[1]
        self.rate = 0.5 * (self.eigenvalues[:k] / self.variance).log().sum().item()
        self.distortion = 0.5 * size * math.log(2 * math.pi * math.e * self.variance.item())
        self.k = k

    def log_prob(self, x: Tensor) -> Tensor:
        """ln p(x) = ln N(x; m, W W^T + sigma^2 I), in nats: [B] for [B, D]."""
        noise = self.variance * torch.eye(len(self.mean)).to(self.weight)
        return MultivariateNormal(self.mean, self.weight @ self.weight.T + noise).log_prob(x)

    def model(self) -> VAE:
        """The VAE, in float64, whose decoder is W z + m and whose encoder is the exact posterior:
        mu_i = (l_i - sigma^2)^{1/2} / l_i u_i^T (x - m), sigma_qi^2 = sigma^2 / l_i."""
        leading = self.eigenvalues[: self.k]
        encoder = nn.Linear(len(self.mean), 2 * self.k).to(self.mean)
        decoder = nn.Linear(self.k, len(self.mean)).to(self.mean)
        with torch.no_grad():
            encoder.weight.zero_()
            encoder.weight[: self.k] = (self.weight / leading).T
            encoder.bias[: self.k] = -encoder.weight[: self.k] @ self.mean
            encoder.bias[self.k :] = torch.log(self.variance / leading)
            decoder.weight.copy_(self.weight)
            decoder.bias.copy_(self.mean)
        likelihood = Gaussian(math.sqrt(self.variance.item()))
        return VAE(encoder, decoder, latent_shape=self.k, likelihood=likelihood)
