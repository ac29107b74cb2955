"""`report`: a VAE read as a code, with a rate and a distortion."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..ops.arguments import whole
from . import conditions
from .distributions import DiagonalGaussian
from .importance import log_weights
from .priors import Posterior

if TYPE_CHECKING:
    from .vae import VAE

__all__ = ["Report", "report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """Means over N examples of D numbers each; in nats where nothing else is said."""

    examples: int
    """N."""
    elbo: float
    """-rate - distortion."""
    rate: float
    """E KL(q(z | x) || p(z)): what an encoder sends; exact where it has a closed form."""
    distortion: float
    """-E ln p(x | z): what is still missing then."""
    bits: float
    """-elbo / ln 2: the length of the code of one example (for discrete x; for a density, up to
    the constant of the resolution)."""
    bits_per_dim: float
    """bits / D."""
    mutual_information: float
    """I(x; z) = E ln q(z | x) - ln q(z), q(z) = 1/N sum_n q(z | x_n); at most ln N."""
    marginal_kl: float
    """KL(q(z) || p(z)): how far the aggregate posterior is from the prior. With the mutual
    information it adds up to the rate, but for the noise of samples (Hoffman & Johnson 2016, "ELBO
    surgery")."""
    active_units: int
    """Latent dimensions whose posterior mean has a variance over x above the threshold (Burda et
    al. 2016)."""
    mean_variance: list[float]
    """That variance, of each latent dimension."""
    kl_per_dim: list[float]
    """The rate of each latent dimension; empty where it has no closed form."""

    def as_dict(self) -> dict[str, Any]:
        """All fields, JSON-serializable."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            (
                f"ELBO                {self.elbo:.3f} nats: rate {self.rate:.3f}, distortion "
                f"{self.distortion:.3f}",
                f"code length         {self.bits:.3f} bits, {self.bits_per_dim:.4f} bits/dim",
                f"rate                {self.mutual_information:.3f} mutual information + "
                f"{self.marginal_kl:.3f} KL(q(z) || p(z))",
                f"active units        {self.active_units} of {len(self.mean_variance)}",
                "KL per dimension    " + " ".join(f"{value:.2f}" for value in self.kl_per_dim),
            )
        )


@torch.no_grad()
def report(
    model: VAE,
    x: Tensor,
    condition: Any = None,
    *,
    samples: int = 16,
    batch_size: int = 256,
    aggregate: int = 2000,
    threshold: float = 0.01,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Report:
    """What a model does with data x, in the terms of information theory (Alemi et al. 2018, "Fixing
    a broken ELBO").

    Args:
        model: in evaluation mode.
        x: [N, ...].
        condition: of each of them, [N, ...], or a dictionary, list or tuple of such; what has one
            row is shared by all. q(z) is then the mean over x of q(z | x, condition), and ln p(z)
            in KL(q(z) || p(z)) that of each example's condition.
        samples: of z for each example.
        batch_size: examples at a time.
        aggregate: at most so many of the examples, the first, make up q(z); the cost grows with its
            square.
        threshold: above which variance of its posterior mean a unit is active.
        seed, generator: where the noise comes from; at most one of them.

    Raises:
        ValueError: there are no examples, or a tensor of the condition has another number of rows;
            both of seed and generator are given.
    """
    samples = whole("samples", samples, 1)
    if len(x) == 0:
        raise ValueError("x has no examples; want at least 1")
    if seed is not None:
        if generator is not None:
            raise ValueError("seed and generator are both given; want one of them")
        generator = torch.Generator(x.device).manual_seed(whole("seed", seed))
    batches = list(conditions.batches(x, condition, batch_size))
    seeds = ops.draw_seed(generator, x.device, len(batches))
    rate = distortion = 0.0
    modes: list[Tensor] = []
    elements: list[Tensor] = []
    for (batch, c), key in zip(batches, seeds, strict=True):
        q = model.encode(batch, c)
        weights = log_weights(model, batch, samples, c, q=q, seed=key)
        exact = model.prior.kl(q, c)
        kl = -weights.log_ratio.mean(0) if exact is None else exact
        rate += kl.sum().item()
        distortion -= weights.log_likelihood.mean(0).sum().item()
        modes.append(q.mode.flatten(1))
        of_each = model.prior.kl(q, c, elementwise=True)
        if of_each is not None:
            elements.append(of_each.flatten(1).sum(0))
    n, size = len(x), math.prod(x.shape[1:])
    rate, distortion = rate / n, distortion / n
    first = conditions.of_each_example(condition, n, lambda t: t[:aggregate])
    batches = list(conditions.batches(x[:aggregate], first, batch_size))
    information, marginal_kl = _aggregate(model, batches, generator)
    variance = torch.cat(modes).double().var(0, correction=0)
    bits = (rate + distortion) / math.log(2)
    return Report(
        examples=n,
        elbo=-rate - distortion,
        rate=rate,
        distortion=distortion,
        bits=bits,
        bits_per_dim=bits / size,
        mutual_information=information,
        marginal_kl=marginal_kl,
        active_units=int((variance > threshold).sum()),
        mean_variance=variance.tolist(),
        kl_per_dim=(torch.stack(elements).sum(0) / n).tolist() if elements else [],
    )


def _aggregate(
    model: VAE, batches: list[tuple[Tensor, Any]], generator: torch.Generator | None
) -> tuple[float, float]:
    """I(x; z) and KL(q(z) || p(z)), from one z of each example."""
    posteriors: list[Posterior] = [model.encode(batch, condition) for batch, condition in batches]
    n = sum(len(batch) for batch, _ in batches)
    information = marginal_kl = 0.0
    for q, (_, condition) in zip(posteriors, batches, strict=True):
        z = q.rsample(generator=generator)
        log_aggregate = _log_aggregate(z, posteriors, n)
        log_prior = model.prior.log_prob(z, condition, event_ndim=len(q.event_shape))
        information += (q.log_prob(z) - log_aggregate).sum().item()
        marginal_kl += (log_aggregate - log_prior).sum().item()
    return information / n, marginal_kl / n


def _log_aggregate(z: Tensor, posteriors: list[Posterior], n: int) -> Tensor:
    """ln q(z), of the mean of n posteriors."""
    gaussians = [q for q in posteriors if isinstance(q, DiagonalGaussian)]
    if len(gaussians) < len(posteriors):
        pairs = torch.cat([q.log_prob(z.unsqueeze(1)) for q in posteriors], 1)
        return torch.logsumexp(pairs, 1) - math.log(n)
    mu, logvar = (torch.cat([getattr(q, name) for q in gaussians]) for name in ("mu", "logvar"))
    return ops.mixture_log_prob(z, mu, logvar, param=gaussians[0].param)
