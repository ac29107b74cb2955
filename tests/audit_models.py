"""VAEs as users write them, correct ones. Those with a fault: audit_faults.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence
from torch.nn import functional as F

import fastvae

D, L, H = 12, 5, 16  # of x, of z, hidden


class Plain(nn.Module):
    """An MLP with the loss of most tutorials: sums over elements, mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, H), nn.Tanh())
        self.mu, self.logvar = nn.Linear(H, L), nn.Linear(H, L)
        self.decoder = nn.Sequential(nn.Linear(L, H), nn.Tanh(), nn.Linear(H, D))

    def forward(self, x: Tensor):
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = self.sample(mu, logvar)
        return self.loss(x, self.decoder(z), mu, logvar)

    def sample(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        return mu + std * torch.randn_like(std)

    def loss(self, x, decoded, mu, logvar):
        return (self.nll(x, decoded) + self.kl(mu, logvar)) / len(x)

    def nll(self, x, decoded):
        return F.mse_loss(decoded, x, reduction="sum")

    def kl(self, mu, logvar):
        return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


class SumOverBatch(Plain):
    """As in PyTorch's own example: Bernoulli, all is summed; returns what it computed, too."""

    def loss(self, x, decoded, mu, logvar):
        bce = F.binary_cross_entropy_with_logits(decoded, x, reduction="sum")
        return bce + self.kl(mu, logvar), decoded, mu, logvar


class MeanOfExamples(Plain):
    """Values of examples, and their mean, in a dict."""

    def loss(self, x, decoded, mu, logvar):
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)
        nll = 0.5 * ((x - decoded) ** 2 / 0.01 + math.log(2 * math.pi * 0.01)).sum(dim=1)
        return {"loss": (kl + nll).mean(), "kl": kl}


class PerPixel(Plain):
    """All of it averaged over pixels and the batch, the KL as well."""

    def loss(self, x, decoded, mu, logvar):
        bce = F.binary_cross_entropy(torch.sigmoid(decoded), x)
        return bce + self.kl(mu, logvar) / x.numel()


class BetaFour(Plain):
    def loss(self, x, decoded, mu, logvar):
        return (self.nll(x, decoded) + 4.0 * self.kl(mu, logvar)) / len(x)


class Convolutional(nn.Module):
    """Latents [B, C, h, w]; packed parameters; batch normalization and dropout; in-place noise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(8, 6, 1),
        )
        self.decoder = nn.ConvTranspose2d(3, 1, 4, 2, 1)

    def forward(self, x: Tensor):
        mu, logvar = torch.chunk(self.encoder(x), 2, dim=1)
        logvar = torch.clamp(logvar, -30.0, 20.0)
        std = logvar.mul(0.5).exp_()
        eps = torch.empty_like(std).normal_()
        z = eps.mul(std).add_(mu)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=[1, 2, 3])
        nll = F.l1_loss(self.decoder(z), x, reduction="none").flatten(1).sum(1)
        return torch.mean(kl + nll)


class Volume(nn.Module):
    """5-D latents."""

    dims = (1, 2, 3, 4)

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(1, 4, 3, 2, 1)
        self.decoder = nn.ConvTranspose3d(2, 1, 4, 2, 1)

    def forward(self, x: Tensor):
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        kl = self.kl(mu, logvar)
        nll = 0.5 * (self.decoder(z) - x).square().flatten(1).sum(1).mean()
        return nll + kl

    def kl(self, mu, logvar):
        return 0.5 * torch.sum(mu**2 + logvar.exp() - 1 - logvar, dim=[1, 2, 3, 4]).mean()


class Hierarchical(nn.Module):
    """Two levels, the lower with a prior that the upper one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 2 * L), nn.Linear(D + L, 2 * 4)
        self.prior = nn.Sequential(nn.Linear(L, H), nn.Tanh(), nn.Linear(H, 2 * 4))
        self.decoder = nn.Sequential(nn.Linear(L + 4, H), nn.Tanh(), nn.Linear(H, D))

    def forward(self, x: Tensor):
        mu1, logvar1 = self.first(x).chunk(2, 1)
        z1 = mu1 + torch.exp(0.5 * logvar1) * torch.randn_like(mu1)
        mu2, logvar2 = self.second(torch.cat([x, z1], 1)).chunk(2, 1)
        z2 = mu2 + torch.exp(0.5 * logvar2) * torch.randn_like(mu2)
        mu_p, logvar_p = self.prior(z1).chunk(2, 1)
        kl1 = 0.5 * (mu1**2 + logvar1.exp() - 1 - logvar1).sum(1)
        ratio = logvar2 - logvar_p
        kl2 = 0.5 * (ratio.exp() - 1 - ratio + (mu2 - mu_p) ** 2 * torch.exp(-logvar_p)).sum(1)
        nll = -Normal(self.decoder(torch.cat([z1, z2], 1)), 0.5).log_prob(x).sum(1)
        return (nll + kl1 + kl2).mean()


class Distributions(nn.Module):
    """torch.distributions throughout; a softplus for sigma; sigma of x learned."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 2 * L), nn.Linear(L, D)
        self.log_sigma = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor):
        mu, raw = self.encoder(x).chunk(2, -1)
        q = Independent(Normal(mu, F.softplus(raw) + 1e-5), 1)
        p = Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1)
        z = q.rsample()
        px = Independent(Normal(self.decoder(z), self.log_sigma.exp()), 1)
        return (kl_divergence(q, p) - px.log_prob(x)).mean()


class Softplus(Plain):
    def sample(self, mu, logvar):
        return mu + F.softplus(logvar) * torch.randn_like(mu)

    def kl(self, mu, logvar):
        std = F.softplus(logvar)
        return torch.sum(0.5 * (mu**2 + std**2 - 1) - std.log())


class LogStd(Plain):
    def sample(self, mu, logvar):
        return torch.addcmul(mu, logvar.exp(), torch.randn(mu.shape))

    def kl(self, mu, logvar):
        return torch.sum(0.5 * (mu**2 + torch.exp(2 * logvar) - 1) - logvar)


class SeveralSamples(Plain):
    """The mean of three samples' likelihoods, one after the other."""

    def forward(self, x: Tensor):
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        nll = 0.0
        for _ in range(3):
            nll = nll + self.nll(x, self.decoder(self.sample(mu, logvar))) / 3
        return (nll + self.kl(mu, logvar)) / len(x)


class MonteCarlo(Plain):
    """The KL by ln q(z | x) - ln p(z)."""

    def forward(self, x: Tensor):
        h = self.encoder(x)
        q = Normal(self.mu(h), torch.exp(0.5 * self.logvar(h)))
        z = q.rsample()
        log_ratio = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)
        log_px = Bernoulli(logits=self.decoder(z)).log_prob(x).sum(1)
        return (log_ratio - log_px).mean()


class ImportanceWeighted(Plain):
    samples = 6

    def forward(self, x: Tensor):
        h = self.encoder(x)
        q = Normal(self.mu(h), torch.exp(0.5 * self.logvar(h)))
        z = q.rsample((self.samples,))
        log_p = Normal(0.0, 1.0).log_prob(z).sum(-1)
        bce = F.binary_cross_entropy_with_logits(
            self.decoder(z), x.expand(self.samples, *x.shape), reduction="none"
        )
        log_w = log_p - bce.sum(-1) - q.log_prob(z).sum(-1)
        return -(torch.logsumexp(log_w, 0) - math.log(self.samples)).mean()


class FreeBits(Plain):
    def loss(self, x, decoded, mu, logvar):
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean(0)
        return self.nll(x, decoded) / len(x) + kl.clamp(min=0.25).sum()


class ZeroStart(Plain):
    """Heads and the last layer of the decoder start at zero."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.mu, self.logvar, self.decoder[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class Denoising(Plain):
    """Gaussian noise on x, which is no latent variable; a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor):
        noise = torch.empty_like(x).normal_(generator=self.generator)
        h = self.encoder(x + 0.1 * noise)
        mu, logvar = self.mu(h), self.logvar(h)
        return self.loss(x, self.decoder(self.sample(mu, logvar)), mu, logvar)


class Fused(Plain):
    """fastvae's ops."""

    def forward(self, x: Tensor):
        h = self.encoder(x)
        z, kl = fastvae.rsample_kl(self.mu(h), self.logvar(h))
        log_px = fastvae.gaussian_log_prob(x, self.decoder(z), 0.3, param="std")
        return (kl - log_px).mean()


class FusedLoss(Plain):
    def forward(self, x: Tensor):
        h = self.encoder(x)
        q = fastvae.DiagonalGaussian(self.mu(h), self.logvar(h))
        z, kl = q.rsample_kl()
        return fastvae.bernoulli_nll_loss(x, self.decoder(z)) + kl.mean()


class HiddenNoise(Plain):
    """Gaussian noise in a hidden layer, of a fixed scale."""

    def forward(self, x: Tensor):
        h = self.encoder(x)
        h = h + 0.1 * torch.randn_like(h)
        mu, logvar = self.mu(h), self.logvar(h)
        return self.loss(x, self.decoder(self.sample(mu, logvar)), mu, logvar)


CORRECT: list[type[nn.Module]] = [
    Plain, SumOverBatch, MeanOfExamples, PerPixel, Convolutional, Volume, Hierarchical,
    Distributions, Softplus, LogStd, SeveralSamples, MonteCarlo, ImportanceWeighted, FreeBits,
    ZeroStart, Denoising, HiddenNoise, Fused, FusedLoss,
]  # fmt: skip


def data(model: nn.Module, n: int = 9) -> Tensor:
    torch.manual_seed(1)
    if isinstance(model, Convolutional):
        return torch.rand(n, 1, 8, 8)
    if isinstance(model, Volume):
        return torch.rand(n, 1, 4, 6, 10)
    x = torch.rand(n, D)
    return x.round() if isinstance(model, MonteCarlo) else x
