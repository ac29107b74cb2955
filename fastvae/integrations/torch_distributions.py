"""torch.distributions' Normal, and what is built on it, by fastvae's kernels.

    import fastvae.integrations.torch_distributions
    fastvae.integrations.torch_distributions.patch()           # .undo() puts it back
    with fastvae.integrations.torch_distributions.patch(): ...

Served: `rsample`, `sample` and `log_prob` of Normal and of an Independent of it, which is one pass
with its sum, and their KL divergences; so too what calls them, such as LogNormal. Noise is
fastvae's, seeded by `torch.manual_seed` all the same. float32 and float64 tensors of one dtype are
served, on devices that have kernels; all else goes to the original, as do calls that TorchScript
traces. Arguments are validated as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl

from .. import ops
from .patching import Patch, serves_alike, shared

__all__ = ["patch"]


def patch() -> Patch:
    """Turns it on; see the module."""
    patch = Patch()
    patch.replace(Normal, "rsample", normal_rsample)
    patch.replace(Normal, "sample", _sample)
    patch.replace(Normal, "log_prob", normal_log_prob)
    patch.replace(Independent, "log_prob", _independent_log_prob)
    patch.replace_kl(Normal, Normal, _kl)
    patch.replace_kl(Independent, Independent, _independent_kl)
    return patch


def normal_rsample(self: Normal, sample_shape: Any = ()) -> Any:
    """In place of `Normal.rsample`."""
    loc, scale = self.loc, self.scale
    if not serves_alike(loc, scale):
        return NotImplemented
    if sample_shape == ():  # a call without it is the cheapest
        return ops.rsample(loc, shared(scale), param="std")
    shape = torch.Size(sample_shape)
    return _or_its_error(ops.rsample, loc, shared(scale), param="std", sample_shape=shape)


def _sample(self: Normal, sample_shape: Any = ()) -> Any:
    with torch.no_grad():
        return normal_rsample(self, sample_shape)


def normal_log_prob(self: Normal, value: Any) -> Any:
    """In place of `Normal.log_prob`."""
    return _event_log_prob(self, value, 0)


def _event_log_prob(normal: Normal, value: Any, event_ndim: int) -> Any:
    if not serves_alike(normal.loc, normal.scale, value):
        return NotImplemented
    if normal._validate_args:
        normal._validate_sample(value)
    return _or_its_error(
        ops.gaussian_log_prob,
        value,
        normal.loc,
        shared(normal.scale),
        param="std",
        event_ndim=event_ndim,
    )


def _independent_log_prob(self: Independent[Any], value: Any) -> Any:
    base = self.base_dist
    if type(base).log_prob is not Normal.log_prob:
        return NotImplemented
    return _event_log_prob(base, value, self.reinterpreted_batch_ndims)


def _kl(p: Normal, q: Normal) -> Any:
    return _event_kl(p, q, 0)


def _event_kl(p: Normal, q: Normal, event_ndim: int) -> Any:
    if not serves_alike(p.loc, p.scale, q.loc, q.scale):
        return NotImplemented
    loc, scale = q.loc, q.scale
    if loc.shape == p.loc.shape:  # else the result's shape is not p's
        loc, scale = shared(loc), shared(scale)
    return _or_its_error(
        ops.kl_divergence,
        p.loc,
        shared(p.scale),
        loc,
        scale,
        param="std",
        event_ndim=event_ndim,
    )


def _independent_kl(p: Independent[Any], q: Independent[Any]) -> Any:
    event_ndim = p.reinterpreted_batch_ndims
    if event_ndim != q.reinterpreted_batch_ndims:
        return NotImplemented
    if not _as_normals(p.base_dist, q.base_dist):
        return NotImplemented
    return _event_kl(p.base_dist, q.base_dist, event_ndim)


def _as_normals(p: Distribution, q: Distribution) -> bool:
    """Whether `kl_divergence` takes both as Normals, rather than as a subclass of its own."""
    kinds = type(p), type(q)
    function = kl._KL_MEMOIZE.get(kinds)
    if function is None:
        function = kl._KL_MEMOIZE[kinds] = kl._dispatch_kl(*kinds)
    return function is kl._KL_REGISTRY[Normal, Normal]


def _or_its_error(op: Callable[..., Tensor], *args: Any, **settings: Any) -> Any:
    """Shapes that cannot be are left to the original, and to its error."""
    try:
        return op(*args, **settings)
    except ValueError:
        return NotImplemented
