"""VAEs with one fault each, whose line says so."""

from __future__ import annotations

import torch
from audit_models import BetaFour, D, Hierarchical, L, Plain, SumOverBatch, Volume
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import fastvae


class KLAveraged(Plain):
    def loss(self, x, decoded, mu, logvar):
        kl = torch.mean(0.5 * (mu**2 + logvar.exp() - 1 - logvar))  # fault
        return self.nll(x, decoded) / len(x) + kl


class KLOfOneBatch(Plain):
    def loss(self, x, decoded, mu, logvar):
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)
        bce = F.binary_cross_entropy_with_logits(decoded, x, reduction="sum")
        return bce + kl.mean()  # fault


class WrongDimensions(Volume):
    def kl(self, mu, logvar):
        kl = 0.5 * torch.sum(mu**2 + logvar.exp() - 1 - logvar, dim=[1, 2, 3])  # fault
        return kl.mean()


class HalfMissing(SumOverBatch):
    def kl(self, mu, logvar):
        return -torch.sum(1 + logvar - mu.pow(2) - logvar.exp())  # fault


class HalfOfLogvarMissing(Plain):
    def kl(self, mu, logvar):
        return torch.sum(0.5 * (mu**2 + logvar.exp() - 1) - logvar)  # fault


class MeanNotSquared(Plain):
    def kl(self, mu, logvar):
        return -0.5 * torch.sum(1 + logvar - mu - logvar.exp())  # fault


class WrongSign(Plain):
    def kl(self, mu, logvar):
        return 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())  # fault


class Reversed(Plain):
    def kl(self, mu, logvar):
        q = Normal(mu, torch.exp(0.5 * logvar))
        return kl_divergence(Normal(0.0, 1.0), q).sum()  # fault


class OneLevelWithoutKL(Hierarchical):
    def forward(self, x: Tensor):
        mu1, logvar1 = self.first(x).chunk(2, 1)
        z1 = mu1 + torch.exp(0.5 * logvar1) * torch.randn_like(mu1)
        mu2, logvar2 = self.second(torch.cat([x, z1], 1)).chunk(2, 1)
        z2 = mu2 + torch.exp(0.5 * logvar2) * torch.randn_like(mu2)  # fault
        kl = 0.5 * (mu1**2 + logvar1.exp() - 1 - logvar1).sum(1)
        nll = -Normal(self.decoder(torch.cat([z1, z2], 1)), 0.5).log_prob(x).sum(1)
        return (nll + kl).mean()


class VarianceAsSigma(Plain):
    def sample(self, mu, logvar):
        return mu + logvar.exp() * torch.randn_like(mu)  # fault


class SoftplusVarianceAsSigma(Plain):
    def sample(self, mu, logvar):
        return mu + F.softplus(logvar) * torch.randn_like(mu)  # fault

    def kl(self, mu, logvar):
        variance = F.softplus(logvar)
        return 0.5 * torch.sum(mu**2 + variance - 1 - variance.log())


class LogvarAsSigma(Plain):
    def sample(self, mu, logvar):
        return mu + logvar * torch.randn_like(mu)  # fault


class NegativeExponent(Plain):
    def sample(self, mu, logvar):
        return mu + torch.exp(-0.5 * logvar) * torch.randn_like(mu)  # fault


class NoiseTooSmall(Plain):
    def sample(self, mu, logvar):
        noise = torch.empty_like(mu).normal_(0, 0.1)  # fault
        return mu + torch.exp(0.5 * logvar) * noise


class SigmaHalved(Plain):
    def sample(self, mu, logvar):
        return mu + 0.5 * torch.exp(0.5 * logvar) * torch.randn_like(mu)  # fault


class UniformNoise(Plain):
    def sample(self, mu, logvar):
        return mu + torch.exp(0.5 * logvar) * torch.rand_like(mu)  # fault


class SameSeed(Plain):
    def sample(self, mu, logvar):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(mu.shape, generator=generator)  # fault
        return mu + torch.exp(0.5 * logvar) * noise


class OneNoiseForAll(Plain):
    def sample(self, mu, logvar):
        return mu + torch.exp(0.5 * logvar) * torch.randn(L)  # fault


class FixedNoise(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.randn(L))

    def forward(self, x: Tensor):  # fault
        return super().forward(x)

    def sample(self, mu, logvar):
        return mu + torch.exp(0.5 * logvar) * self.noise


class WrongMode(Plain):
    def forward(self, x: Tensor):  # fault
        return super().forward(x)

    def sample(self, mu, logvar):
        return mu if self.training else super().sample(mu, logvar)


class DecoderGivenMean(Plain):
    def forward(self, x: Tensor):
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        self.sample(mu, logvar)
        decoded = self.decoder(mu)  # fault
        return self.loss(x, decoded, mu, logvar)


class Overflowing(Plain):
    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.logvar.bias, 14.0)

    def sample(self, mu, logvar):
        std = torch.exp(0.5 * logvar)  # fault
        return mu + std * torch.randn_like(std)


class NegativeKL(Plain):
    def kl(self, mu, logvar):
        return -0.5 * torch.sum(2 + logvar - mu.pow(2) - logvar.exp())  # fault


class NotReparameterized(Plain):
    def sample(self, mu, logvar):
        return Normal(mu, torch.exp(0.5 * logvar)).sample()  # fault


class DrawnDirectly(Plain):
    def sample(self, mu, logvar):
        return torch.normal(mu, torch.exp(0.5 * logvar))  # fault


class Detached(Plain):
    def sample(self, mu, logvar):
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return z.detach()  # fault


class SigmaDetached(Plain):
    def sample(self, mu, logvar):
        std = torch.exp(0.5 * logvar.detach())  # fault
        return mu + std * torch.randn_like(std)


class NoKL(Plain):
    def sample(self, mu, logvar):
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)  # fault

    def loss(self, x, decoded, mu, logvar):
        return self.nll(x, decoded)


class KLDetached(Plain):
    def kl(self, mu, logvar):
        mu, logvar = mu.detach(), logvar.detach()
        return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())  # fault


class ErrorsAveraged(Plain):
    def loss(self, x, decoded, mu, logvar):
        error = F.mse_loss(decoded, x)  # fault
        return error + self.kl(mu, logvar) / len(x)


class PixelsAveraged(Plain):
    def loss(self, x, decoded, mu, logvar):
        bce = F.binary_cross_entropy_with_logits(decoded, x, reduction="none").mean(1)  # fault
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)
        return (bce + kl).mean()


class DensityAveraged(Plain):
    def loss(self, x, decoded, mu, logvar):
        log_px = Normal(decoded, 0.3).log_prob(x).mean()  # fault
        return self.kl(mu, logvar) / len(x) - log_px


class LikelihoodAdded(Plain):
    def loss(self, x, decoded, mu, logvar):
        log_px = -F.binary_cross_entropy_with_logits(decoded, x, reduction="sum")  # fault
        return (log_px + self.kl(mu, logvar)) / len(x)


class SamplesSummed(Plain):
    def forward(self, x: Tensor):
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.exp(0.5 * logvar) * torch.randn(4, *mu.shape)
        bce = F.binary_cross_entropy_with_logits(  # fault
            self.decoder(z), x.expand(4, *x.shape), reduction="none"
        )
        return (bce.sum() + self.kl(mu, logvar)) / len(x)


class WrongBeta(BetaFour):
    def loss(self, x, decoded, mu, logvar):
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)  # fault
        return self.nll(x, decoded) / len(x) + 3.5 * kl.mean()


class FusedWrongly(Plain):
    """fastvae's ops, told that logvar is the variance's root."""

    def forward(self, x: Tensor):
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = fastvae.rsample(mu, logvar, param="log_std")  # fault
        log_px = fastvae.bernoulli_log_prob(x, self.decoder(z))
        return (fastvae.kl_divergence(mu, logvar) - log_px).mean()


class FusedAveraged(Plain):
    def forward(self, x: Tensor):
        h = self.encoder(x)
        z, kl = fastvae.rsample_kl(self.mu(h), self.logvar(h), event_ndim=0)
        return fastvae.bernoulli_nll_loss(x, self.decoder(z)) + kl.mean()  # fault


# The name of the fault, and what is measured.
FAULTY: dict[type[nn.Module], tuple[str, float]] = {
    KLAveraged: ("kl-averaged", 1 / L),
    KLOfOneBatch: ("kl-batch", 1 / 7),
    WrongDimensions: ("kl-dimensions", 1 / 5),
    HalfMissing: ("kl-half-missing", 2.0),
    HalfOfLogvarMissing: ("kl-terms", 2.0),
    MeanNotSquared: ("kl-terms", 0.0),
    WrongSign: ("kl-sign", -1.0),
    Reversed: ("kl-reversed", -2.0),
    OneLevelWithoutKL: ("kl-missing", 0.0),
    VarianceAsSigma: ("sigma-confused", 0.5),
    SoftplusVarianceAsSigma: ("sigma-confused", 0.5),
    LogvarAsSigma: ("logvar-as-sigma", None),
    NegativeExponent: ("sigma-confused", -1.0),
    NoiseTooSmall: ("noise-scale", 0.1),
    SigmaHalved: ("noise-scale", 0.5),
    UniformNoise: ("noise-not-normal", None),
    SameSeed: ("noise-not-fresh", 0.0),
    OneNoiseForAll: ("noise-shared", 7.0),
    FixedNoise: ("no-noise", 0.0),
    WrongMode: ("no-noise", 0.0),
    DecoderGivenMean: ("decoder-given-mu", 0.0),
    Overflowing: ("logvar-overflow", None),
    NegativeKL: ("kl-negative", None),
    NotReparameterized: ("not-differentiable", 0.0),
    DrawnDirectly: ("not-differentiable", 0.0),
    Detached: ("not-differentiable", 0.0),
    SigmaDetached: ("not-differentiable", 0.0),
    NoKL: ("kl-missing", 0.0),
    KLDetached: ("kl-detached", 0.0),
    ErrorsAveraged: ("likelihood-averaged", D),
    PixelsAveraged: ("likelihood-averaged", D),
    DensityAveraged: ("likelihood-averaged", D),
    LikelihoodAdded: ("likelihood-sign", -1.0),
    SamplesSummed: ("likelihood-samples", 1 / 4),
    WrongBeta: ("kl-weight", 3.5),
    FusedWrongly: ("sigma-confused", 0.5),
    FusedAveraged: ("kl-averaged", 1 / L),
}
