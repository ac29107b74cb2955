"""Small models whose exact answers are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import fastvae
from fastvae import VAE

B, D, L = 5, 6, 3


def mlp(device: torch.device, *, outputs: int = 1, **options: object) -> tuple[VAE, Tensor]:
    """A small nonlinear model and its data, in float64."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, options.pop("params", 2 * L)))
    decoder = nn.Sequential(nn.Linear(L, 8), nn.Tanh(), nn.Linear(8, outputs * D))
    model = VAE(encoder, decoder, latent_shape=L, **options).double().to(device)
    return model, torch.rand(B, D, dtype=torch.float64).to(device)


class FactorAnalysis:
    """x = W z + noise: p(x) and p(z | x) are Gaussians, exactly."""

    def __init__(self, device: torch.device, sigma: float = 0.4, n: int = B) -> None:
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(D, L, dtype=torch.float64, generator=generator)
        z = torch.randn(n, L, dtype=torch.float64, generator=generator)
        eps = torch.randn(n, D, dtype=torch.float64, generator=generator)
        self.x = (z @ w.T + sigma * eps).to(device)
        self.w, self.sigma = w.to(device), sigma
        eye = torch.eye(D, dtype=torch.float64, device=device)
        self.log_prob = MultivariateNormal(
            eye.new_zeros(D), self.w @ self.w.T + sigma**2 * eye
        ).log_prob(self.x)
        precision = torch.eye(L).to(eye) + self.w.T @ self.w / sigma**2
        self.covariance = torch.linalg.inv(precision)
        self.gain = self.covariance @ self.w.T / sigma**2  # E[z | x] = gain x

    def model(self, *, exact: bool = True, **options: object) -> VAE:
        """A VAE whose decoder is W, and whose posterior is p(z | x) or something near it."""
        cholesky = torch.linalg.cholesky(self.covariance)
        rows, columns = torch.tril_indices(L, L, -1)
        constants = torch.cat([2 * cholesky.diagonal().log(), cholesky[rows, columns]])
        encoder = nn.Linear(D, L + len(constants)).to(self.w)
        decoder = nn.Linear(L, D, bias=False).to(self.w)
        with torch.no_grad():
            encoder.weight.zero_()
            encoder.weight[:L] = self.gain if exact else 0.9 * self.gain
            encoder.bias.zero_()
            encoder.bias[L:] = constants
            decoder.weight.copy_(self.w)
        return VAE(
            encoder,
            decoder,
            latent_shape=L,
            likelihood=fastvae.Gaussian(self.sigma),
            posterior=fastvae.CholeskyGaussian.from_params,
            **options,
        )
