"""`CholeskyGaussian`: a posterior with full covariance."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from .. import ops
from ..ops.arguments import tensor_arguments
from ..ops.elements import computed_in
from ..ops.noise import Generators
from .distributions import DiagonalGaussian

if TYPE_CHECKING:
    from typing_extensions import Self

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

    Of two dtypes the wider is taken, and float32 for half types, which triangular solvers do not
    take.

    Raises:
        TypeError, ValueError: as `fastvae.rsample`; `scale_tril` does not have that shape.
    """

    arg_constraints = {}  # noqa: RUF012  values are not checked
    has_rsample = True

    def __init__(self, mu: Tensor, scale_tril: Tensor) -> None:
        (mu,), _ = tensor_arguments(mu=mu)
        (scale_tril,), _ = tensor_arguments(scale_tril=scale_tril)
        mu, scale_tril = _alike(mu, scale_tril)
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
        generator: Generators | None = None,
    ) -> Tensor:
        """Reparameterized samples of shape `sample_shape + batch_shape + event_shape`."""
        return self.rsample_with_eps(sample_shape, seed=seed, generator=generator)[0]

    def rsample_with_eps(
        self,
        sample_shape: Sequence[int] = (),
        *,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rsample` and its noise: z = mu + L eps, and eps, which is constant for autograd."""
        eps = ops.rsample(
            torch.zeros_like(self.mu),
            0.0,
            sample_shape=sample_shape,
            seed=seed,
            generator=generator,
        )
        return self.mu + (self.scale_tril @ eps.unsqueeze(-1)).squeeze(-1), eps

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """As `rsample`, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed=seed, generator=generator)

    def kl(self, prior: DiagonalGaussian | CholeskyGaussian | None = None) -> Tensor:
        """KL(self || prior) in nats, of shape `batch_shape`; the prior is N(0, I) if None.

        To N(mu_p, diag sigma_p^2), 1/2 sum_{i > j} L_ij^2 / sigma_pi^2 is added to the diagonal KL.
        To N(mu_p, L_p L_p^T) it is that of N(L_p^-1 (mu - mu_p), M M^T), M = L_p^-1 L, to N(0, I).
        """
        if isinstance(prior, CholeskyGaussian):
            return self._relative_to(prior).kl()
        below = self.scale_tril.tril(-1).square().sum(-1)
        if prior is not None:
            below = below / prior.variance
        diagonal = DiagonalGaussian(self.mu, self._logvar(), event_ndim=1)
        return diagonal.kl(prior) + 0.5 * below.sum(-1)

    def _relative_to(self, prior: CholeskyGaussian) -> CholeskyGaussian:
        """This Gaussian in the coordinates in which `prior` is N(0, I)."""
        scale, theirs = _alike(self.scale_tril, prior.scale_tril)
        difference = (self.mu - prior.mu).to(theirs.dtype).unsqueeze(-1)
        mu = torch.linalg.solve_triangular(theirs, difference, upper=False).squeeze(-1)
        return CholeskyGaussian(mu, torch.linalg.solve_triangular(theirs, scale, upper=False))

    def rsample_kl(
        self,
        prior: DiagonalGaussian | CholeskyGaussian | None = None,
        *,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rsample()` and `kl(prior)`."""
        return self.rsample(seed=seed, generator=generator), self.kl(prior)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln q(value) = ln N(L^-1 (value - mu); 0, I) - sum_i ln L_ii, in nats."""
        (value,), _ = tensor_arguments(value=value)
        scale, difference = _alike(self.scale_tril, (value - self.mu).unsqueeze(-1))
        eps = torch.linalg.solve_triangular(scale, difference, upper=False).squeeze(-1)
        return ops.gaussian_log_prob(eps, 0.0, 0.0, event_ndim=1) - self._log_det() / 2

    def entropy(self) -> Tensor:
        """1/2 ln det Sigma + k/2 ln(2 pi e), in nats."""
        return self._log_det() / 2 + 0.5 * math.log(2 * math.pi * math.e) * self.mu.shape[-1]

    def detach(self) -> Self:
        """The same distribution, constant for autograd."""
        new = copy.copy(self)
        tensors = {name: t.detach() for name, t in vars(self).items() if isinstance(t, Tensor)}
        vars(new).update(tensors)
        return new

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """The same distribution with its batch dimensions expanded; see `DiagonalGaussian`."""
        new: Self = self._get_checked_instance(CholeskyGaussian, _instance)
        batch = torch.Size(batch_shape)
        new.mu = self.mu.expand(*batch, -1)
        new.scale_tril = self.scale_tril.expand(*batch, -1, -1)
        super(CholeskyGaussian, new).__init__(batch, self.event_shape, validate_args=False)
        return new

    def _logvar(self) -> Tensor:
        """ln L_ii^2."""
        return 2 * torch.log(self.scale_tril.diagonal(dim1=-2, dim2=-1))

    def _log_det(self) -> Tensor:
        return self._logvar().sum(-1)

    @property
    def loc(self) -> Tensor:
        return self.mu

    @property
    def event_dim(self) -> int:
        return 1

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


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors in the wider of their dtypes, float32 for half types."""
    a, b = computed_in(a), computed_in(b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
