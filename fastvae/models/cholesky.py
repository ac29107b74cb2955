"""`CholeskyGaussian`: a posterior with full covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from .. import ops
from ..ops.arguments import tensor_arguments
from .distributions import DiagonalGaussian

__all__ = ["CholeskyGaussian"]


class CholeskyGaussian(Distribution):
    """N(mu, Sigma) with Sigma = L L^T, over one latent dimension of size k.

    Samples are z = mu + L eps, eps the normals of `fastvae.rsample`, and

        KL(q || N(0, I)) = 1/2 (-ln det Sigma - k + tr Sigma + mu^T mu)

    which, by ln det Sigma = 2 sum_i ln L_ii and tr Sigma = sum_ij L_ij^2, is the KL of a diagonal
    Gaussian with variances L_ii^2, plus 1/2 sum_{i > j} L_ij^2; so it is computed, and is never
    negative. It has the methods of `DiagonalGaussian` that objectives use.

    Args:
        mu: [..., k].
        scale_tril: L, [..., k, k], lower triangular with a positive diagonal; what is above the
            diagonal is not read.

    Raises:
        TypeError, ValueError: as `fastvae.rsample`; `scale_tril` does not have that shape.
    """

    arg_constraints = {}  # noqa: RUF012  values are not checked
    has_rsample = True

    def __init__(self, mu: Tensor, scale_tril: Tensor) -> None:
        (mu,), _ = tensor_arguments(mu=mu)
        if scale_tril.shape[-2:] != (*mu.shape[-1:], *mu.shape[-1:]):
            raise ValueError(
                f"scale_tril has shape {list(scale_tril.shape)}; want two last dimensions of "
                f"{mu.shape[-1]}, the size of mu"
            )
        batch = torch.broadcast_shapes(mu.shape[:-1], scale_tril.shape[:-2])
        self.mu = mu.expand(*batch, -1)
        self.scale_tril = scale_tril.tril().expand(*batch, -1, -1)
        super().__init__(batch, mu.shape[-1:], validate_args=False)

    @classmethod
    def from_params(cls, params: Tensor) -> CholeskyGaussian:
        """The Gaussian of an encoder's output [..., k + k + k (k - 1) / 2]: mu, ln L_ii^2, and the
        entries below the diagonal of L, row by row.

        Raises:
            ValueError: the last dimension has no such size.
        """
        size = params.shape[-1]
        k = (math.isqrt(9 + 8 * size) - 3) // 2
        if k * (k + 3) // 2 != size or k < 1:
            raise ValueError(
                f"params has shape {list(params.shape)}; want a last dimension of k (k + 3) / 2, "
                "such as 2, 5, 9, 14"
            )
        if params.dtype in (torch.bfloat16, torch.float16):  # which triangular solvers do not take
            params = params.float()
        mu, logvar, below = params.split([k, k, size - 2 * k], -1)
        scale_tril = torch.diag_embed(torch.exp(0.5 * logvar))
        rows, columns = torch.tril_indices(k, k, -1, device=params.device)
        scale_tril[..., rows, columns] = below
        return cls(mu, scale_tril)

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Reparameterized samples of shape `sample_shape + batch_shape + event_shape`."""
        eps = ops.rsample(
            torch.zeros_like(self.mu),
            0.0,
            sample_shape=sample_shape,
            seed=seed,
            generator=generator,
        )
        return self.mu + (self.scale_tril @ eps.unsqueeze(-1)).squeeze(-1)

    def kl(self, prior: DiagonalGaussian | None = None) -> Tensor:
        """KL(self || prior) in nats, of shape `batch_shape`; the prior is N(0, I) if None.

        To N(mu_p, diag sigma_p^2), 1/2 sum_{i > j} L_ij^2 / sigma_pi^2 is added to the diagonal KL.
        """
        below = self.scale_tril.tril(-1).square().sum(-1)
        if prior is not None:
            below = below / prior.variance
        diagonal = DiagonalGaussian(self.mu, self._logvar(), event_ndim=1)
        return diagonal.kl(prior) + 0.5 * below.sum(-1)

    def rsample_kl(
        self,
        prior: DiagonalGaussian | None = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rsample()` and `kl(prior)`."""
        return self.rsample(seed=seed, generator=generator), self.kl(prior)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln q(value) = ln N(L^-1 (value - mu); 0, I) - sum_i ln L_ii, in nats."""
        difference = (value - self.mu).unsqueeze(-1)
        eps = torch.linalg.solve_triangular(self.scale_tril, difference, upper=False).squeeze(-1)
        return ops.gaussian_log_prob(eps, 0.0, 0.0, event_ndim=1) - self._log_det() / 2

    def entropy(self) -> Tensor:
        """1/2 ln det Sigma + k/2 ln(2 pi e), in nats."""
        return self._log_det() / 2 + 0.5 * math.log(2 * math.pi * math.e) * self.mu.shape[-1]

    def detach(self) -> CholeskyGaussian:
        """The same Gaussian, constant for autograd."""
        return CholeskyGaussian(self.mu.detach(), self.scale_tril.detach())

    def _logvar(self) -> Tensor:
        """ln L_ii^2."""
        return 2 * torch.log(self.scale_tril.diagonal(dim1=-2, dim2=-1))

    def _log_det(self) -> Tensor:
        return self._logvar().sum(-1)

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def mode(self) -> Tensor:
        return self.mu

    @property
    def variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1)

    @property
    def covariance_matrix(self) -> Tensor:
        """Sigma, [..., k, k]."""
        return self.scale_tril @ self.scale_tril.mT

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, 1)
