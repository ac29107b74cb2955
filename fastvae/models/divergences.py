"""KL divergences of `DiagonalGaussian` and `CholeskyGaussian` from and to the distributions of
`torch.distributions`, for `torch.distributions.kl_divergence`.

| with | `DiagonalGaussian` | `CholeskyGaussian` |
|---|---|---|
| each other, themselves, `Normal`, `Independent(Normal)` | both ways | both ways |
| `MultivariateNormal`, `LowRankMultivariateNormal` | both ways | both ways |
| `Laplace`, `Gumbel`, `Uniform`, and all that PyTorch knows with a `Normal` | both ways | no |

A one-dimensional distribution stands for each element: it broadcasts against the Gaussian, whose
events are then summed, so that `kl_divergence(q, Normal(0.0, 1.0))` is `q.kl()`. An `Independent`
must have as many event dimensions as the Gaussian (ValueError). Values are in nats, of the batch's
shape, float32 for half types.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    ContinuousBernoulli,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    Uniform,
    kl_divergence,
    register_kl,
)

from ..ops.elements import computed_in
from .cholesky import CholeskyGaussian
from .distributions import DiagonalGaussian

__all__: list[str] = []

_Gaussian = DiagonalGaussian | CholeskyGaussian
_ELEMENTS = (Beta, ContinuousBernoulli, Exponential, Gamma, Gumbel, Laplace, Pareto, Uniform)
"""What PyTorch has KL divergences for, from and to a Normal."""


def _event(p: Normal, like: _Gaussian) -> DiagonalGaussian:
    """A Normal whose elements make up events such as those of another Gaussian."""
    shape = torch.broadcast_shapes(p.batch_shape, like.event_shape)
    loc, scale = p.loc.expand(shape), p.scale.expand(shape)
    return DiagonalGaussian(loc, scale, param="std", event_ndim=like.event_dim)


def _elements(g: DiagonalGaussian) -> Normal:
    return Normal(computed_in(g.mean), computed_in(g.stddev), validate_args=False)


def _full(g: Distribution) -> CholeskyGaussian:
    """A Gaussian with its covariance."""
    if isinstance(g, CholeskyGaussian):
        return g
    if not isinstance(g, DiagonalGaussian):
        return CholeskyGaussian(g.loc, g.scale_tril)  # type: ignore[attr-defined]
    if g.event_ndim != 1:
        raise ValueError(
            f"a DiagonalGaussian has event_ndim {g.event_ndim}; want 1, that of the Gaussian with "
            "full covariance beside it"
        )
    return CholeskyGaussian(g.mean, torch.diag_embed(g.stddev))


def _base(p: Independent[Any], like: _Gaussian) -> Distribution:
    """What an Independent, or several around each other, is made of."""
    base: Distribution = p
    while isinstance(base, Independent):
        base = base.base_dist
    if base.event_shape:
        raise NotImplementedError(f"no KL divergence with an Independent of {type(base).__name__}")
    if len(p.event_shape) != like.event_dim:
        raise ValueError(
            f"an Independent has {len(p.event_shape)} event dimensions; want those of the "
            f"{type(like).__name__} beside it, {like.event_dim}"
        )
    return base


# ---- The divergences -----------------------------------------------------------------------------


def _of_gaussians(q: Any, p: Any) -> Tensor:
    return q.kl(p)


def _full_full(q: Distribution, p: Distribution) -> Tensor:
    return _full(q).kl(_full(p))


def _to_normal(q: _Gaussian, p: Normal) -> Tensor:
    return kl_divergence(q, _event(p, q))


def _from_normal(q: Normal, p: _Gaussian) -> Tensor:
    return kl_divergence(_event(q, p), p)


def _to_independent(q: _Gaussian, p: Independent[Any]) -> Tensor:
    return kl_divergence(q, _base(p, q))


def _from_independent(q: Independent[Any], p: _Gaussian) -> Tensor:
    return kl_divergence(_base(q, p), p)


def _to_elements(q: DiagonalGaussian, p: Distribution) -> Tensor:
    return _summed(kl_divergence(_elements(q), p), p, q)


def _from_elements(q: Distribution, p: DiagonalGaussian) -> Tensor:
    return _summed(kl_divergence(q, _elements(p)), q, p)


def _summed(elements: Tensor, partner: Distribution, gaussian: DiagonalGaussian) -> Tensor:
    # PyTorch's infinite divergences have the first distribution's shape only.
    shape = torch.broadcast_shapes(partner.batch_shape, gaussian.mean.shape)
    elements = elements.expand(shape)
    dims = tuple(range(-gaussian.event_ndim, 0))
    return elements.sum(dims) if dims else elements


# ---- Registration --------------------------------------------------------------------------------

register_kl(DiagonalGaussian, DiagonalGaussian)(_of_gaussians)
register_kl(CholeskyGaussian, DiagonalGaussian)(_of_gaussians)
register_kl(CholeskyGaussian, CholeskyGaussian)(_of_gaussians)
register_kl(DiagonalGaussian, CholeskyGaussian)(_full_full)
for _ours in (DiagonalGaussian, CholeskyGaussian):
    register_kl(_ours, Normal)(_to_normal)
    register_kl(Normal, _ours)(_from_normal)
    register_kl(_ours, Independent)(_to_independent)
    register_kl(Independent, _ours)(_from_independent)
    for _theirs in (MultivariateNormal, LowRankMultivariateNormal):
        register_kl(_ours, _theirs)(_full_full)
        register_kl(_theirs, _ours)(_full_full)
for _element in _ELEMENTS:
    register_kl(DiagonalGaussian, _element)(_to_elements)
    register_kl(_element, DiagonalGaussian)(_from_elements)
