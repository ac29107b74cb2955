"""Importance weights of a VAE, and what is made of them.

The log-weight of a sample z ~ q(z | x) is

    ln w = ln p(x | z) + ln p(z) - ln q(z | x)

Its mean is the ELBO, and the mean of w itself is p(x). `_weigh` is the one place where
its latent part is formed, `log_weights` the one where the likelihood joins it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.arguments import whole
from .distributions import DiagonalGaussian
from .priors import GaussianPrior, Posterior, Prior

if TYPE_CHECKING:
    from .vae import VAE

__all__ = [
    "LogLikelihood",
    "LogWeights",
    "effective_sample_size",
    "importance_sampling",
    "log_mean_exp",
    "log_weights",
    "prior_sampling",
    "rsample_log_weight",
]


class LogWeights(NamedTuple):
    """K samples for each of B examples; densities in nats."""

    z: Tensor
    """[K, B, *latent_shape]."""
    decoded: Tensor
    """The decoder's output, [K, B, ...]."""
    log_likelihood: Tensor
    """[K, B]: ln p(x | z)."""
    log_ratio: Tensor
    """[K, B]: ln p(z) - ln q(z | x)."""
    through: tuple[Tensor, ...]
    """With `path_derivative`, the gradient of ln w reaches q through these, and only q through
    them: z; and log_ratio, where one pass makes both."""

    @property
    def total(self) -> Tensor:
        """[K, B]: ln w."""
        return self.log_likelihood + self.log_ratio


def rsample_log_weight(
    q: Posterior,
    prior: Prior,
    n: int,
    condition: Any = None,
    *,
    path_derivative: bool = False,
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """n samples z of q, and ln p(z) - ln q(z), the part of their log-weights before the likelihood.

    One pass makes both where q and p are diagonal Gaussians (`fastvae.rsample_log_ratio`), unless
    p is learned and `path_derivative` is asked for.

    Args:
        q: of `batch_shape` [B].
        prior: p.
        n: how many samples; more never change the first ones under one seed.
        path_derivative: take q's parameters in ln q(z) as constants, so that the gradient reaches
            them through z alone. The dropped term is the score d/dphi ln q, whose mean is 0.
        seed, generator: as in `fastvae.rsample`.

    Returns:
        z, [n, B, *latent_shape], and [n, B] in nats.
    """
    z, log_ratio, _ = _weigh(
        q, prior, n, condition, path_derivative=path_derivative, seed=seed, generator=generator
    )
    return z, log_ratio


def _weigh(
    q: Posterior, prior: Prior, n: int, condition: Any, *, path_derivative: bool, **noise: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """z, log_ratio and through, as in `LogWeights`."""
    p: Prior | DiagonalGaussian | None = prior
    if isinstance(q, DiagonalGaussian) and isinstance(prior, GaussianPrior):
        p = prior.gaussian(condition, q.mu.dtype)
        learned = p is not None and (p.mu.requires_grad or p.logvar.requires_grad)
        if not (path_derivative and learned):  # else log_ratio has p's own gradient too
            z, log_ratio = q.rsample_log_ratio(p, (n,), path_derivative=path_derivative, **noise)
            return z, log_ratio, (z, log_ratio)
    z = q.rsample((n,), **noise)
    if isinstance(p, DiagonalGaussian):
        log_p = p.log_prob(z)
    else:
        log_p = prior.log_prob(z, condition, event_ndim=len(q.event_shape))
    density = q.detach() if path_derivative else q
    return z, log_p - density.log_prob(z), (z,)


def log_weights(
    model: VAE,
    x: Tensor,
    n: int,
    condition: Any = None,
    *,
    q: Posterior | None = None,
    path_derivative: bool = False,
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> LogWeights:
    """The log-weights of n samples z ~ q(z | x) for each of a batch's examples.

    Args:
        q: `model.encode(x)`, if it is known already.
        path_derivative, seed, generator: as in `rsample_log_weight`.
    """
    if q is None:
        q = model.encode(x, condition)
    z, log_ratio, through = _weigh(
        q,
        model.prior,
        n,
        condition,
        path_derivative=path_derivative,
        seed=seed,
        generator=generator,
    )
    decoded = model.decode(z, condition, sample_ndim=1)
    log_likelihood = model.log_prob(x, decoded, condition)
    return LogWeights(z, decoded, log_likelihood, log_ratio, through)


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """ln (1/K sum_k w_k), from ln w_k along `dim`."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def effective_sample_size(log_w: Tensor, dim: int = 0) -> Tensor:
    """(sum w)^2 / sum w^2, from 1 (one weight is all) to K (Kong 1992), from ln w along `dim`."""
    return torch.exp(2 * torch.logsumexp(log_w, dim) - torch.logsumexp(2 * log_w, dim))


class LogLikelihood(NamedTuple):
    """An estimate of ln p(x) for each of B examples, in nats."""

    value: Tensor
    """[B], float64: ln of the mean weight, which is biased low by about half of
    standard_error^2."""
    standard_error: Tensor
    """[B]: of `value`, by the delta method, sd(w) / (mean(w) sqrt(n)). An effective sample size of
    a few means that it is too low itself."""
    effective_sample_size: Tensor
    """[B]: (sum w)^2 / sum w^2, of n."""


class _Weights:
    """Running sums of w and w^2, as logarithms: memory does not grow with the number of weights."""

    def __init__(self) -> None:
        self.n = 0
        self.log_sum = self.log_sum_of_squares = torch.tensor(-math.inf, dtype=torch.float64)

    def add(self, log_w: Tensor) -> None:
        """Weights along dimension 0."""
        log_w = log_w.double()
        self.n += len(log_w)
        self.log_sum = torch.logaddexp(self.log_sum.to(log_w.device), torch.logsumexp(log_w, 0))
        self.log_sum_of_squares = torch.logaddexp(
            self.log_sum_of_squares.to(log_w.device), torch.logsumexp(2 * log_w, 0)
        )

    def result(self) -> LogLikelihood:
        n = self.n
        ess = torch.exp(2 * self.log_sum - self.log_sum_of_squares)
        relative_variance = (n / ess - 1).clamp(min=0) / (n - 1) if n > 1 else math.nan * ess
        return LogLikelihood(self.log_sum - math.log(n), relative_variance.sqrt(), ess)


@torch.no_grad()
def importance_sampling(
    model: VAE,
    x: Tensor,
    n_samples: int,
    condition: Any = None,
    *,
    chunk: int = 16,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """ln p(x) ~ ln 1/n sum_i p(x | z_i) p(z_i) / q(z_i | x), z_i ~ q(z | x) (Rezende et al. 2014;
    Burda et al. 2016).

    Samples stream through in chunks: memory is that of one chunk whatever `n_samples` is. The
    expectation of the value rises with n_samples, towards ln p(x).

    Args:
        x: [B, ...].
        n_samples: n, for each example.
        chunk: samples at a time; a matter of memory and speed, and of which noise is drawn.
        seed, generator: where the chunks' noise comes from; at most one of them.
    """
    weights = _Weights()
    q = model.encode(x, condition)
    for n, key in _chunks(n_samples, chunk, x.device, seed, generator):
        weights.add(log_weights(model, x, n, condition, q=q, seed=key).total)
    return weights.result()


@torch.no_grad()
def prior_sampling(
    model: VAE,
    x: Tensor,
    n_samples: int,
    *,
    chunk: int = 256,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """ln p(x) ~ ln 1/n sum_i p(x | z_i), z_i ~ p(z), the same z_i for every x.

    The estimate that comes first to mind, and useless for all but the smallest problems: few z of
    the prior explain a given x, so that almost all of the sum is a single term. The effective
    sample size, near 1 of n, shows it; `value` is then far too low, and `standard_error` too.

    Args:
        x: [B, ...].
        n_samples, chunk, seed, generator: as in `importance_sampling`.

    Raises:
        ValueError: the model was made without `latent_shape`.
    """
    weights = _Weights()
    for n, key in _chunks(n_samples, chunk, x.device, seed, generator):
        decoded = model.decode(model.sample_latent(n, seed=key))
        pairs = decoded.unsqueeze(1).expand(n, len(x), *decoded.shape[1:])
        weights.add(model.likelihood.log_prob(x, pairs))
    return weights.result()


def _chunks(
    n_samples: int,
    chunk: int,
    device: torch.device,
    seed: int | None,
    generator: torch.Generator | None,
) -> Iterator[tuple[int, Tensor]]:
    """How many samples to draw, and under which seed, until there are `n_samples`."""
    n_samples, chunk = whole("n_samples", n_samples, 1), whole("chunk", chunk, 1)
    if seed is not None:
        if generator is not None:
            raise ValueError("seed and generator are both given; want one of them")
        generator = torch.Generator(device).manual_seed(whole("seed", seed))
    for start in range(0, n_samples, chunk):
        yield min(chunk, n_samples - start), ops.draw_seed(generator, device)
