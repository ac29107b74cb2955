"""Objectives that look at the aggregate posterior q(z) = E q(z | x), not at each posterior alone.

They share the ELBO's distortion, -E ln p(x | z), and one z of each example; instead of the rate
KL(q(z | x) || p(z)) they pay

    BetaTC      alpha I(x; z) + beta TC(z) + gamma sum_d KL(q(z_d) || p(z_d))
    InfoVAE     (1 - alpha) KL(q(z | x) || p(z)) + (alpha + lambda - 1) MMD(q(z), p(z))
    DIPVAE      KL(q(z | x) || p(z)) + how far the covariance of q(z) is from I

With BetaTC at 1, 1, 1 and InfoVAE at alpha = 0, lambda = 1 that is the rate, up to the estimates.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from .distributions import DiagonalGaussian
from .objectives import VAEOutput
from .penalties import check_not_negative
from .priors import Posterior

if TYPE_CHECKING:
    from .vae import VAE

__all__ = ["DIPVAE", "BetaTC", "InfoVAE", "mmd"]


class _Aggregate:
    """An objective that pays a penalty of a batch's posteriors and samples."""

    def penalty(
        self, model: VAE, q: Posterior, z: Tensor, kl: Tensor, condition: Any, **noise: Any
    ) -> Tensor:
        """0-d, in nats; `kl` is the rate of each example, `noise` the seed or generator of what
        else is drawn."""
        raise NotImplementedError

    def __call__(
        self,
        model: VAE,
        x: Tensor,
        condition: Any = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> VAEOutput:
        q = model.encode(x, condition)
        z, kl = model.prior.rsample_kl(q, condition, seed=seed, generator=generator)
        decoded = model.decode(z, condition)
        log_likelihood = model.log_prob(x, decoded, condition)
        # Another stream from the same seed: under its bitwise complement.
        noise = {"seed": None if seed is None else ~seed, "generator": generator}
        loss = self.penalty(model, q, z, kl, condition, **noise) - log_likelihood.mean()
        return VAEOutput(loss, log_likelihood - kl, log_likelihood, kl, z, decoded)


@dataclasses.dataclass
class BetaTC(_Aggregate):
    """The rate cut into mutual information, total correlation and the KL of each dimension, each
    with a factor of its own (Chen, Li, Grosse & Duvenaud 2018, "Isolating sources of
    disentanglement in VAEs"; their beta-TCVAE has alpha = gamma = 1):

        I(x; z) = E ln q(z | x) - ln q(z)
        TC      = E ln q(z) - sum_d ln q(z_d)
        KL_d    = E sum_d ln q(z_d) - ln p(z)

    q(z) and its marginals are estimated by `fastvae.aggregate_log_prob`.

    Args:
        dataset_size: how many examples the data have; a batch is some of them.
        alpha, beta, gamma: the factors, at least 0.
        estimator: "mss", which knows that each z is of an example in its own batch, or "mws".

    Raises:
        ValueError: a number out of range, or an unknown `estimator`.
        TypeError: when called, of a model whose posterior is no diagonal Gaussian.
    """

    dataset_size: int
    alpha: float = 1.0
    beta: float = 6.0
    gamma: float = 1.0
    estimator: str = "mss"

    def __post_init__(self) -> None:
        if self.dataset_size < 1:
            raise ValueError(f"dataset_size is {self.dataset_size}; want at least 1")
        for name in ("alpha", "beta", "gamma"):
            check_not_negative(name, getattr(self, name))
        if self.estimator not in ("mss", "mws"):
            raise ValueError(f"estimator is {self.estimator!r}; want 'mss' or 'mws'")

    def penalty(
        self, model: VAE, q: Posterior, z: Tensor, kl: Tensor, condition: Any, **noise: Any
    ) -> Tensor:
        information, correlation, marginal_kl = self.terms(model, q, z, condition)
        return self.alpha * information + self.beta * correlation + self.gamma * marginal_kl

    def terms(
        self, model: VAE, q: Posterior, z: Tensor, condition: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """I(x; z), TC and sum_d KL_d, 0-d, of a sample z of q."""
        if not isinstance(q, DiagonalGaussian):
            raise TypeError(
                f"BetaTC: the posterior is a {type(q).__name__}; want a diagonal Gaussian, whose "
                "marginals are known"
            )
        joint, marginals = ops.aggregate_log_prob(
            z,
            q.mu,
            q.logvar,
            dataset_size=max(self.dataset_size, len(z)),
            estimator=self.estimator,
            param=q.param,
        )
        prior = model.prior.log_prob(z, condition, event_ndim=len(q.event_shape))
        information = (q.log_prob(z) - joint).mean()
        return information, (joint - marginals).mean(), (marginals - prior).mean()


@dataclasses.dataclass
class InfoVAE(_Aggregate):
    """The rate, less what the code tells of the data, and the maximum mean discrepancy of q(z) and
    the prior (Zhao, Song & Ermon 2019, "InfoVAE"):

        (1 - alpha) KL(q(z | x) || p(z)) + (alpha + lambda - 1) MMD(q(z), p(z))

    alpha = 1 leaves the MMD alone, weighted by lambda: the MMD-VAE, and the Wasserstein autoencoder
    of Tolstikhin et al. (2018) where the posteriors are points.

    Args:
        alpha: at most 1.
        lambda_: at least 1 - alpha.
        kernel, scale: see `mmd`.

    Raises:
        ValueError: a number out of range, or an unknown `kernel`.
    """

    alpha: float = 0.0
    lambda_: float = 10.0
    kernel: str = "imq"
    scale: float | None = None

    def __post_init__(self) -> None:
        if not self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; want at most 1")
        if not 1 - self.alpha <= self.lambda_ < math.inf:
            raise ValueError(f"lambda_ is {self.lambda_}; want at least 1 - alpha")
        _check_kernel(self.kernel, self.scale)

    def penalty(
        self, model: VAE, q: Posterior, z: Tensor, kl: Tensor, condition: Any, **noise: Any
    ) -> Tensor:
        drawn = model.prior.sample(torch.zeros_like(z), condition, **noise)
        discrepancy = mmd(z.flatten(1), drawn.flatten(1), kernel=self.kernel, scale=self.scale)
        return (1 - self.alpha) * kl.mean() + (self.alpha + self.lambda_ - 1) * discrepancy


@dataclasses.dataclass
class DIPVAE(_Aggregate):
    """The rate, and squares of what the covariance of q(z) differs by from I (Kumar, Sattigeri &
    Balakrishnan 2018, "Variational inference of disentangled latent concepts from unlabeled
    observations"):

        off_diagonal sum_{i != j} C_ij^2 + diagonal sum_i (C_ii - 1)^2

    Args:
        off_diagonal, diagonal: the factors, at least 0.
        kind: 1: C is the covariance of the posteriors' means (DIP-VAE-I); 2: of q(z), which has the
            posteriors' mean variances on its diagonal too (DIP-VAE-II).

    Raises:
        ValueError: a number out of range.
        TypeError: when called, of a model whose posterior is no diagonal Gaussian.
    """

    off_diagonal: float = 10.0
    diagonal: float = 10.0
    kind: int = 2

    def __post_init__(self) -> None:
        check_not_negative("off_diagonal", self.off_diagonal)
        check_not_negative("diagonal", self.diagonal)
        if self.kind not in (1, 2):
            raise ValueError(f"kind is {self.kind}; want 1 or 2")

    def penalty(
        self, model: VAE, q: Posterior, z: Tensor, kl: Tensor, condition: Any, **noise: Any
    ) -> Tensor:
        if not isinstance(q, DiagonalGaussian):
            raise TypeError(
                f"DIPVAE: the posterior is a {type(q).__name__}; want a diagonal Gaussian"
            )
        mean = q.mean.flatten(1)
        centred = mean - mean.mean(0)
        covariance = centred.T @ centred / len(mean)
        variances = covariance.diagonal()
        off = covariance.square().sum() - variances.square().sum()
        if self.kind == 2:
            variances = variances + q.variance.flatten(1).mean(0)
        return kl.mean() + self.off_diagonal * off + self.diagonal * (variances - 1).square().sum()


def mmd(x: Tensor, y: Tensor, *, kernel: str = "imq", scale: float | None = None) -> Tensor:
    """The maximum mean discrepancy of two samples (Gretton et al. 2012, "A kernel two-sample
    test"), squared and without bias, so that it may be below 0:

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

    - "rbf": k = exp(-|x - y|^2 / (2 c))
    - "imq", the inverse multiquadratic: k = c / (c + |x - y|^2), whose tails are heavier

    No tensor of all pairs and dimensions is made.

    Args:
        x, y: [n, D] and [m, D], two at least.
        scale: c; default 2 D, the mean square distance of two standard normals, or for "rbf" half
            of that.

    Returns:
        0-d.

    Raises:
        ValueError: an unknown kernel, a scale that is not above 0, or fewer than two rows.
    """
    _check_kernel(kernel, scale)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"samples are of {len(x)} and {len(y)} rows; want two each at least")
    size = x.shape[1]
    c = (size if kernel == "rbf" else 2 * size) if scale is None else scale

    def mean_of(a: Tensor, b: Tensor) -> Tensor:
        squares = _squared_distances(a, b)
        k = torch.exp(-squares / (2 * c)) if kernel == "rbf" else c / (c + squares)
        if a is not b:
            return k.mean()
        return (k.sum() - len(a)) / (len(a) * (len(a) - 1))  # k(x, x) is 1

    return mean_of(x, x) + mean_of(y, y) - 2 * mean_of(x, y)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[n, m]: minus twice the logarithms of normal densities, but for their constant."""
    log_prob = ops.pairwise_log_prob(a, b, 0.0)
    return (-2 * log_prob - a.shape[1] * math.log(2 * math.pi)).clamp(min=0)


def _check_kernel(kernel: str, scale: float | None) -> None:
    if kernel not in ("rbf", "imq"):
        raise ValueError(f"kernel is {kernel!r}; want 'rbf' or 'imq'")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; want a number above 0")
