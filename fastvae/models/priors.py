"""Priors p(z), or p(z | condition), of a VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.arguments import as_shape
from ..ops.noise import draw, make_seed
from .cholesky import CholeskyGaussian
from .distributions import DiagonalGaussian

__all__ = [
    "ConditionalGaussian",
    "GaussianPrior",
    "LearnedGaussianPrior",
    "MixturePrior",
    "Posterior",
    "Prior",
    "StandardNormal",
    "VampPrior",
]

Posterior = DiagonalGaussian | CholeskyGaussian


class Prior(nn.Module):
    """What z is before x is seen.

    `condition` is whatever the prior's own network takes, None if it has none.
    """

    def log_prob(self, z: Tensor, condition: Any = None, *, event_ndim: int = 1) -> Tensor:
        """ln p(z) in nats; the last `event_ndim` dimensions of z are one latent."""
        raise NotImplementedError

    def sample(
        self,
        zeros: Tensor,
        condition: Any = None,
        *,
        temperature: float = 1.0,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws from p; noise as in `fastvae.rsample`.

        Args:
            zeros: [n, *latent_shape], which say how many, of which dtype and where.
            temperature: factor of the standard deviation (of each component of a mixture).
        """
        raise NotImplementedError

    def kl(
        self, q: Posterior, condition: Any = None, *, elementwise: bool = False
    ) -> Tensor | None:
        """KL(q || p) in nats, [B], or for each latent dimension, [B, *latent_shape]; None where it
        has no closed form."""
        return None

    def rsample_kl(
        self,
        q: Posterior,
        condition: Any = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z ~ q, and KL(q || p); without a closed form its estimate from z, ln q(z) - ln p(z)."""
        z = q.rsample(seed=seed, generator=generator)
        return z, q.log_prob(z) - self.log_prob(z, condition, event_ndim=len(q.event_shape))


# ---- Gaussian ------------------------------------------------------------------------------------


class GaussianPrior(Prior):
    """Any diagonal Gaussian: subclasses give `gaussian`, None being N(0, I). Its KL is exact."""

    def gaussian(self, condition: Any, dtype: torch.dtype) -> DiagonalGaussian | None:
        """p, with tensors of `dtype`."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, condition: Any = None, *, event_ndim: int = 1) -> Tensor:
        p = self.gaussian(condition, z.dtype)
        if p is None:
            return ops.gaussian_log_prob(z, 0.0, 0.0, event_ndim=event_ndim)
        return p.log_prob(z)

    def sample(
        self,
        zeros: Tensor,
        condition: Any = None,
        *,
        temperature: float = 1.0,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        p = self.gaussian(condition, zeros.dtype)
        mean, std = (zeros, 1.0) if p is None else (p.mean + zeros, p.stddev)
        return ops.rsample(mean, std * temperature, param="std", seed=seed, generator=generator)

    def kl(
        self, q: Posterior, condition: Any = None, *, elementwise: bool = False
    ) -> Tensor | None:
        p = self.gaussian(condition, q.mu.dtype)
        if not elementwise:
            return q.kl(p)
        if not isinstance(q, DiagonalGaussian):
            return None
        return _elements(q).kl(None if p is None else _elements(p))

    def rsample_kl(
        self,
        q: Posterior,
        condition: Any = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        p = self.gaussian(condition, q.mu.dtype)
        return q.rsample_kl(p, seed=seed, generator=generator)


def _elements(g: DiagonalGaussian) -> DiagonalGaussian:
    """g with every dimension an event of its own."""
    return DiagonalGaussian(g.mu, g.logvar, param=g.param, event_ndim=0)


class StandardNormal(GaussianPrior):
    """N(0, I)."""

    def gaussian(self, condition: Any, dtype: torch.dtype) -> None:
        return None

    def rsample_kl(
        self,
        q: Posterior,
        condition: Any = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        return q.rsample_kl(seed=seed, generator=generator)  # the hot path


class LearnedGaussianPrior(GaussianPrior):
    """N(mu_p, diag sigma_p^2) with mu_p and ln sigma_p^2 parameters of the model, at first 0.

    Args:
        latent_shape: shape of one z, or its only size.
    """

    def __init__(self, latent_shape: int | Sequence[int]) -> None:
        super().__init__()
        shape = as_shape("latent_shape", latent_shape)
        self.mu = nn.Parameter(torch.zeros(1, *shape))
        self.logvar = nn.Parameter(torch.zeros(1, *shape))

    def gaussian(self, condition: Any, dtype: torch.dtype) -> DiagonalGaussian:
        return DiagonalGaussian(self.mu.to(dtype), self.logvar.to(dtype))


class ConditionalGaussian(GaussianPrior):
    """p(z | c) = N(mu_p(c), diag sigma_p(c)^2): a conditional VAE's prior, or one level of a
    hierarchy, c being the level above (Sohn et al. 2015; Sønderby et al. 2016).

    Args:
        network: from c, [B, ...], to a tensor whose halves along `dim` are mu_p and ln sigma_p^2.
        dim, param: as in `DiagonalGaussian.from_params`.
    """

    def __init__(self, network: nn.Module, *, dim: int = 1, param: str = "logvar") -> None:
        super().__init__()
        self.network = network
        self.dim = dim
        self.param = param

    def gaussian(self, condition: Any, dtype: torch.dtype) -> DiagonalGaussian:
        if condition is None:
            raise ValueError("condition is None; want what the prior's network takes")
        params = self.network(condition).to(dtype)
        return DiagonalGaussian.from_params(params, self.dim, param=self.param)


# ---- Mixtures ------------------------------------------------------------------------------------


class _Mixture(Prior):
    """p(z) = sum_k w_k p_k(z), w = softmax(logits); its KL is estimated from samples."""

    def __init__(self, components: int) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"components is {components}; want at least 1")
        self.logits = nn.Parameter(torch.zeros(components))

    def components(self) -> Posterior:
        """The p_k, of `batch_shape` [components]."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, condition: Any = None, *, event_ndim: int = 1) -> Tensor:
        p, log_weights = self.components(), torch.log_softmax(self.logits, 0)
        if isinstance(p, DiagonalGaussian):
            return ops.mixture_log_prob(
                z, p.mu, p.logvar, log_weights, param=p.param, event_ndim=event_ndim
            )
        of_each = p.log_prob(z.unsqueeze(-1 - event_ndim))
        return torch.logsumexp(of_each + log_weights.to(of_each.dtype), -1)

    def responsibilities(self, z: Tensor, *, event_ndim: int = 1) -> Tensor:
        """p(k | z), of z's shape with the components in the place of the event: to which cluster
        z belongs (Jiang et al. 2017, "Variational deep embedding")."""
        p = self.components()
        if isinstance(p, DiagonalGaussian):
            of_each = ops.pairwise_log_prob(z, p.mu, p.logvar, param=p.param, event_ndim=event_ndim)
        else:
            of_each = p.log_prob(z.unsqueeze(-1 - event_ndim))
        return torch.softmax(of_each + torch.log_softmax(self.logits, 0).to(of_each.dtype), -1)

    def sample(
        self,
        zeros: Tensor,
        condition: Any = None,
        *,
        temperature: float = 1.0,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        n, p = len(zeros), self.components()
        source = make_seed(seed, generator, zeros, (n,))
        seed = source if isinstance(source, Tensor) else draw(zeros.device, source)
        # Two independent streams from one seed: of the components under its bitwise complement.
        u = torch.special.ndtr(ops.rsample(zeros.new_zeros(n), 0.0, seed=seed).double())
        chosen = (torch.softmax(self.logits, 0).cumsum(0)[:-1] < u.unsqueeze(-1)).sum(-1)
        z = p.mode + temperature * (p.rsample((n,), seed=~seed) - p.mode)
        return z[torch.arange(n, device=z.device), chosen].to(zeros.dtype)


class MixturePrior(_Mixture):
    """A mixture of diagonal Gaussians, all of its parameters learned.

    Args:
        components: how many.
        latent_shape: shape of one z, or its only size.
        spread: standard deviation of the components' initial means; their variances are 1 at first.
    """

    def __init__(
        self, components: int, latent_shape: int | Sequence[int], *, spread: float = 1.0
    ) -> None:
        super().__init__(components)
        shape = as_shape("latent_shape", latent_shape)
        self.mu = nn.Parameter(spread * torch.randn(components, *shape))
        self.logvar = nn.Parameter(torch.zeros(components, *shape))

    def components(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.mu, self.logvar)


class VampPrior(_Mixture):
    """p(z) = sum_k w_k q(z | u_k): the posteriors of learned pseudo-inputs (Tomczak & Welling 2018,
    "VAE with a VampPrior").

    Args:
        encode: the model's own `VAE.encode`.
        pseudo_inputs: [components, ...], initial u; some of the training data serve well.

    Example:
        >>> model = fastvae.VAE(encoder, decoder, latent_shape=16)
        >>> model.prior = fastvae.VampPrior(model.encode, x[:50])
    """

    def __init__(self, encode: Callable[[Tensor], Posterior], pseudo_inputs: Tensor) -> None:
        super().__init__(len(pseudo_inputs))
        self.encode = encode
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())

    def components(self) -> Posterior:
        return self.encode(self.pseudo_inputs)
