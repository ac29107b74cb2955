"""The ops as users write them: in PyTorch or JAX, and in torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    ContinuousBernoulli,
    Independent,
    Laplace,
    NegativeBinomial,
    Normal,
    OneHotCategoricalStraightThrough,
    Poisson,
    kl_divergence,
)
from torch.nn import functional as F

from .cases import DREAMER, MIN_STD, SIGMA
from .shapes import SAMPLES

__all__ = ["Distributions", "Formulas", "Library"]

Function = Callable[..., Any]

_EPS = 1e-8  # scvi-tools'


class Library:
    """The public functions, by name, as another library has them."""

    def __getattr__(self, name: str) -> Any:
        if "_nll_loss" not in name:
            raise AttributeError(name)
        log_prob = getattr(self, name.replace("nll_loss", "log_prob"))
        return lambda *tensors: -log_prob(*tensors).mean()


class Formulas(Library):
    """In `lib`, which is torch or jax.numpy: they share the functions used here."""

    def __init__(self, lib: Any, normal_like: Function) -> None:
        self.lib = lib
        self.normal_like = normal_like

    def rsample(self, mu: Any, logvar: Any) -> Any:
        std = self.lib.exp(0.5 * logvar)
        return mu + std * self.normal_like(std)

    def kl_divergence(self, mu: Any, logvar: Any, *prior: Any) -> Any:
        exp = self.lib.exp
        if not prior:
            return -0.5 * _rows(1 + logvar - mu**2 - exp(logvar))
        prior_mu, prior_logvar = prior
        ratio = (exp(logvar) + (mu - prior_mu) ** 2) / exp(prior_logvar)
        return 0.5 * _rows(prior_logvar - logvar - 1 + ratio)

    def balanced_kl_divergence(self, *operands: Any) -> Any:
        """DreamerV2's."""
        (*q, prior_mu, prior_logvar), kl = operands, self.kl_divergence
        stopped = [self._stopped(t) for t in operands]
        return 0.8 * kl(*stopped[:2], prior_mu, prior_logvar) + 0.2 * kl(*q, *stopped[2:])

    def rsample_kl(self, mu: Any, logvar: Any, *prior: Any) -> Any:
        return self.rsample(mu, logvar), self.kl_divergence(mu, logvar, *prior)

    def rsample_kl_softplus(self, mu: Any, s: Any) -> tuple[Any, Any]:
        std = self._softplus(s) + MIN_STD
        kl = 0.5 * _rows(mu**2 + std**2 - 1 - 2 * self.lib.log(std))
        return mu + std * self.normal_like(std), kl

    def rsample_log_ratio(self, mu: Any, logvar: Any) -> Any:
        std = self.lib.exp(0.5 * logvar)
        eps = self.normal_like(self.lib.broadcast_to(std, (SAMPLES, *std.shape)))
        z = mu + std * eps
        log_2pi = math.log(2 * math.pi)
        log_p = -0.5 * _rows(log_2pi + z**2, 2)
        log_q = -0.5 * _rows(log_2pi + logvar + (z - mu) ** 2 / self.lib.exp(logvar), 2)
        return z, log_p - log_q

    def gaussian_log_prob(self, x: Any, mean: Any, logvar: Any = None) -> Any:
        if logvar is None:
            constant = math.log(SIGMA) + 0.5 * math.log(2 * math.pi)
            return _rows(-0.5 * ((x - mean) / SIGMA) ** 2 - constant)
        return _rows(self._gaussian(x, mean, logvar))

    def gaussian_log_prob_weighted(self, x: Any, weight: Any, mean: Any, logvar: Any) -> Any:
        return _rows(weight * self._gaussian(x, mean, logvar))

    def _gaussian(self, x: Any, mean: Any, logvar: Any) -> Any:
        squares = (x - mean) ** 2 / self.lib.exp(logvar)
        return -0.5 * (math.log(2 * math.pi) + logvar + squares)

    def bernoulli_log_prob(self, x: Any, logits: Any) -> Any:
        return _rows(self._bernoulli(x, logits))

    def continuous_bernoulli_log_prob(self, x: Any, logits: Any) -> Any:
        near = abs(logits) < 0.02
        safe = self.lib.where(near, 1.0, logits)
        far = self.lib.log(safe / self.lib.tanh(0.5 * safe))
        series = math.log(2) + logits**2 / 12 - 7 * logits**4 / 1440
        normalizer = self.lib.where(near, series, far)
        return _rows(self._bernoulli(x, logits) + normalizer)

    def laplace_log_prob(self, x: Any, mean: Any, log_scale: Any = None) -> Any:
        if log_scale is None:
            return _rows(-abs(x - mean) - math.log(2))
        return _rows(-abs(x - mean) / self.lib.exp(log_scale) - log_scale - math.log(2))

    def discretized_logistic_log_prob(self, x: Any, mean: Any, log_scale: Any) -> Any:
        return _rows(self._discretized_logistic(x, mean, log_scale))

    def _discretized_logistic(self, x: Any, mean: Any, log_scale: Any) -> Any:
        half, precision, where = 1 / 510, self.lib.exp(-log_scale), self.lib.where
        first = -self._softplus((mean - x - half) * precision)
        last = -self._softplus((x - mean - half) * precision)
        inside = first + last + self.lib.log(-self.lib.expm1(-2 * half * precision))
        return where(x < half, first, where(x > 1 - half, last, inside))

    def mixture_log_prob(self, z: Any, mu: Any, logvar: Any, log_weights: Any) -> Any:
        return self._logsumexp(self._pairs(z, mu, logvar).sum(-1) + log_weights)

    def aggregate_log_prob(self, z: Any, mu: Any, logvar: Any) -> Any:
        pairs = self._pairs(z, mu, logvar) - math.log(len(mu))
        joint = self._logsumexp(pairs.sum(-1) + (pairs.shape[-1] - 1) * math.log(len(mu)))
        return joint, self._logsumexp(pairs).sum(-1)

    def straight_through_categorical(self, logits: Any) -> Any:
        p = self.lib.exp(self._log_mixed(logits))
        return self._one_hot(p) + p - self._stopped(p)

    def _one_hot(self, p: Any) -> Any:
        chosen = torch.multinomial(p.detach().flatten(0, -2), 1)
        return torch.zeros_like(p).flatten(0, -2).scatter_(-1, chosen, 1.0).view_as(p)

    def balanced_categorical_kl_divergence(self, logits: Any, prior_logits: Any) -> Any:
        q, p = self._log_mixed(logits), self._log_mixed(prior_logits)
        return _dreamer(self._categorical_kl, q, p, self._stopped(q), self._stopped(p))

    def _log_mixed(self, logits: Any) -> Any:
        mix = DREAMER["uniform_mix"]
        softmax = self.lib.exp(self._log_softmax(logits))
        return self.lib.log((1 - mix) * softmax + mix / logits.shape[-1])

    def _categorical_kl(self, log_q: Any, log_p: Any) -> Any:
        return self._at_least(_rows(self.lib.exp(log_q) * (log_q - log_p)), DREAMER["free_nats"])

    def multinomial_log_prob(self, x: Any, logits: Any) -> Any:
        return (x * (logits - self._logsumexp(logits)[:, None])).sum(-1)

    def colour_mixture_log_prob(self, x: Any, parameters: Any) -> Any:
        """PixelCNN++'s, channels last, but for its subtraction of sigmoids, which loses digits."""
        lib, k = self.lib, parameters.shape[1] // 10
        x, p = lib.moveaxis(x, 1, -1)[..., None], lib.moveaxis(parameters, 1, -1)
        logits, p = p[..., :k], p[..., k:].reshape(*p.shape[:-1], 3, 3 * k)
        mean, a = p[..., :k], lib.tanh(p[..., 2 * k :])
        log_scale = self._at_least(p[..., k : 2 * k], -7.0)
        red, green = x[..., :1, :], x[..., 1:2, :]
        second = mean[..., 1:2, :] + a[..., :1, :] * red
        third = mean[..., 2:, :] + a[..., 1:2, :] * red + a[..., 2:, :] * green
        mean = self._joined([mean[..., :1, :], second, third], -2)
        log_mass = self._discretized_logistic(x, mean, log_scale)
        joint = log_mass.sum(-2) + self._log_softmax(logits)
        return _rows(self._logsumexp(joint, -1))

    def _joined(self, parts: Any, dim: int) -> Any:
        return torch.cat(parts, dim) if self.lib is torch else self.lib.concatenate(parts, dim)

    def _at_least(self, t: Any, low: float) -> Any:
        return torch.clamp(t, min=low) if self.lib is torch else self.lib.maximum(t, low)

    def _log_softmax(self, t: Any) -> Any:
        return t - self._logsumexp(t, -1)[..., None]

    def _pairs(self, z: Any, mu: Any, logvar: Any) -> Any:
        z, mu, logvar = (t.reshape(len(t), -1) for t in (z, mu, logvar))
        return self._gaussian(z[:, None], mu, logvar)

    def _logsumexp(self, t: Any, dim: int = 1) -> Any:
        if self.lib is torch:
            return torch.logsumexp(t, dim)
        from jax.scipy.special import logsumexp

        return logsumexp(t, dim)

    # Counts as scvi-tools 1.4 writes them, term by term.

    def poisson_log_prob(self, x: Any, mean: Any) -> Any:
        return _rows(x * self.lib.log(mean) - mean - self._lgamma(x + 1))

    def negative_binomial_log_prob(self, x: Any, mean: Any, theta: Any) -> Any:
        log, eps = self.lib.log, _EPS
        odds = log(theta + mean + eps)
        value = theta * (log(theta + eps) - odds) + x * (log(mean + eps) - odds)
        return _rows(value + self._gammas(x, theta))

    def zero_inflated_negative_binomial_log_prob(
        self, x: Any, mean: Any, theta: Any, zero_logits: Any
    ) -> Any:
        log, eps = self.lib.log, _EPS
        softplus = self._softplus(-zero_logits)
        odds = log(theta + mean + eps)
        at_0 = theta * (log(theta + eps) - odds) - zero_logits
        zero = self._softplus(at_0) - softplus
        above = at_0 - softplus + x * (log(mean + eps) - odds) + self._gammas(x, theta)
        return _rows(self._mask(x < eps, x) * zero + self._mask(x > eps, x) * above)

    def _mask(self, condition: Any, like: Any) -> Any:
        return condition.type_as(like) if self.lib is torch else condition.astype(like.dtype)

    def _gammas(self, x: Any, theta: Any) -> Any:
        return self._lgamma(x + theta) - self._lgamma(theta) - self._lgamma(x + 1)

    # PyTorch has functions for these.

    def _lgamma(self, t: Any) -> Any:
        if self.lib is torch:
            return torch.lgamma(t)
        from jax.scipy.special import gammaln

        return gammaln(t)

    def _stopped(self, t: Any) -> Any:
        if self.lib is torch:
            return t.detach()
        from jax.lax import stop_gradient

        return stop_gradient(t)

    def _bernoulli(self, x: Any, logits: Any) -> Any:
        if self.lib is torch:
            return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return x * logits - self._softplus(logits)

    def _softplus(self, t: Any) -> Any:
        return F.softplus(t) if self.lib is torch else self.lib.logaddexp(t, 0.0)


def _dreamer(kl: Function, q: Any, p: Any, stopped_q: Any, stopped_p: Any) -> Any:
    balance = DREAMER["balance"]
    return balance * kl(stopped_q, p) + (1 - balance) * kl(q, stopped_p)


def _rows(t: Any, dims: int = 1) -> Any:
    return t.reshape(*t.shape[:dims], -1).sum(-1)


class Distributions(Library):
    """In torch.distributions, with its own checks of arguments, as they are by default."""

    def rsample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return _gaussian(mu, logvar).rsample()

    def kl_divergence(self, mu: Tensor, logvar: Tensor, *prior: Tensor) -> Tensor:
        return kl_divergence(_gaussian(mu, logvar), _prior(mu, *prior))

    def rsample_kl(self, mu: Tensor, logvar: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        q = _gaussian(mu, logvar)
        return q.rsample(), kl_divergence(q, _prior(mu, *prior))

    def balanced_kl_divergence(self, *operands: Tensor) -> Tensor:
        stopped = [t.detach() for t in operands]
        q, p = _gaussian(*operands[:2]), _gaussian(*operands[2:])
        to_p = kl_divergence(_gaussian(*stopped[:2]), p)
        return 0.8 * to_p + 0.2 * kl_divergence(q, _gaussian(*stopped[2:]))

    def rsample_kl_softplus(self, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        q = Independent(Normal(mu, F.softplus(s) + MIN_STD), mu.dim() - 1)
        return q.rsample(), kl_divergence(q, _prior(mu))

    def rsample_log_ratio(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        q = _gaussian(mu, logvar)
        z = q.rsample((SAMPLES,))
        return z, _prior(mu).log_prob(z) - q.log_prob(z)

    def gaussian_log_prob(self, x: Tensor, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
        scale = SIGMA if logvar is None else torch.exp(0.5 * logvar)
        return Independent(Normal(mean, scale), mean.dim() - 1).log_prob(x)

    def gaussian_log_prob_weighted(
        self, x: Tensor, weight: Tensor, mean: Tensor, logvar: Tensor
    ) -> Tensor:
        return _rows(weight * Normal(mean, torch.exp(0.5 * logvar)).log_prob(x))

    def straight_through_categorical(self, logits: Tensor) -> Tensor:
        return _categorical(logits).rsample()

    def balanced_categorical_kl_divergence(self, logits: Tensor, prior_logits: Tensor) -> Tensor:
        q, p = _categorical(logits), _categorical(prior_logits)
        stopped_q, stopped_p = _categorical(logits.detach()), _categorical(prior_logits.detach())

        def kl(q: Any, p: Any) -> Tensor:
            return kl_divergence(q, p).clamp(min=DREAMER["free_nats"])

        return _dreamer(kl, q, p, stopped_q, stopped_p)

    def bernoulli_log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        return Independent(Bernoulli(logits=logits), x.dim() - 1).log_prob(x)

    def continuous_bernoulli_log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        return Independent(ContinuousBernoulli(logits=logits), x.dim() - 1).log_prob(x)

    def laplace_log_prob(self, x: Tensor, mean: Tensor, log_scale: Tensor | None = None) -> Tensor:
        scale = 1.0 if log_scale is None else torch.exp(log_scale)
        return Independent(Laplace(mean, scale), x.dim() - 1).log_prob(x)

    def poisson_log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        return Independent(Poisson(mean), x.dim() - 1).log_prob(x)

    def negative_binomial_log_prob(self, x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
        logits = torch.log(mean) - torch.log(theta)
        return Independent(NegativeBinomial(theta, logits=logits), x.dim() - 1).log_prob(x)


def _gaussian(mu: Tensor, logvar: Tensor) -> Any:
    return Independent(Normal(mu, torch.exp(0.5 * logvar)), mu.dim() - 1)


def _categorical(logits: Tensor) -> Any:
    mix = DREAMER["uniform_mix"]
    probs = (1 - mix) * torch.softmax(logits, -1) + mix / logits.shape[-1]
    return Independent(OneHotCategoricalStraightThrough(logits=torch.log(probs)), logits.dim() - 2)


def _prior(mu: Tensor, *prior: Tensor) -> Any:
    if prior:
        return _gaussian(*prior)
    return Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), mu.dim() - 1)
