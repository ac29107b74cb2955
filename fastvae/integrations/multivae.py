"""multivae's Gaussians, divergences and likelihoods by fastvae's kernels.

    import fastvae.integrations.multivae
    fastvae.integrations.multivae.patch()          # before training; .undo() puts it back
    with fastvae.integrations.multivae.patch(): ...

Served: multivae's `rsample_from_gaussian` (MVAE, MoPoE, MVTCAE, DMVAE, CRMVAE, TELBO, Nexus,
MHVAE), `kl_divergence` (DMVAE, CRMVAE, MHVAE, CVAE) and MoPoE's `calc_joint_divergence`; `rsample`
of torch.distributions.Normal (JMVAE, MMVAE, CVAE, JNF) and `log_prob` of Normal and Laplace, the
likelihoods of all of them. The methods of torch.distributions are served for whoever calls them
while the patch is on; the functions, for whoever has imported them, earlier too. Values, shapes,
dtypes and gradients are the original's. Arguments are validated as before, except that
`rsample_from_gaussian` no longer refuses a log-variance of less than about -200, whose sigma is 0.

The noise is fastvae's, another than without the patch, decided by `torch.manual_seed` all the same.

Passed on: half types and what has no kernels. Products of experts, for which fastvae has none, and
the KL divergences that MVAE, JMVAE and MVTCAE write in the midst of `forward`, stay multivae's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace, Normal

from .. import ops
from . import torch_distributions
from .patching import Patch, serves_alike, shared

__all__ = ["patch"]


def patch() -> Patch:
    """Turns it on; see the module.

    Raises:
        ModuleNotFoundError: multivae is not installed.
    """
    from multivae.models import MoPoE
    from multivae.models.base import base_utils

    patch = Patch()
    patch.replace_function(base_utils.rsample_from_gaussian, _rsample_from_gaussian)
    patch.replace_function(base_utils.kl_divergence, _kl_divergence)
    patch.replace(MoPoE, "calc_joint_divergence", _joint_divergence)
    patch.replace(Normal, "rsample", torch_distributions.normal_rsample)
    patch.replace(Normal, "log_prob", torch_distributions.normal_log_prob)
    patch.replace(Laplace, "log_prob", _laplace_log_prob)
    return patch


# ---- multivae's own ------------------------------------------------------------------------------


def _rsample_from_gaussian(
    mu: Any, log_var: Any, N: int = 1, return_mean: bool = False, flatten: bool = False
) -> Any:
    if return_mean or not serves_alike(mu, log_var) or mu.shape != log_var.shape:
        return NotImplemented
    z = ops.rsample(mu, log_var, sample_shape=() if N == 1 else (N,))
    if Distribution._validate_args and z.detach().isnan().any():
        return NotImplemented  # the original says which parameter it refuses
    if N > 1 and flatten and mu.dim() > 1:  # of one example, z is what the original makes of it
        z = z.flatten(0, 1)
    return z


def _kl_divergence(mean: Any, log_var: Any, prior_mean: Any, prior_log_var: Any) -> Any:
    tensors = mean, log_var, prior_mean, prior_log_var
    if not serves_alike(*tensors) or any(t.shape != mean.shape for t in tensors) or not mean.dim():
        return NotImplemented
    return ops.kl_divergence(*tensors, event_ndim=1)


def _joint_divergence(self: Any, mus: Any, logvars: Any, weights: Tensor) -> Any:
    if (
        not serves_alike(mus, logvars)
        or mus.dtype is not torch.get_default_dtype()
        or mus.dim() != 3
    ):
        return NotImplemented
    kl = ops.kl_divergence(mus, logvars, event_ndim=1)
    return {"joint_divergence": (weights.to(mus.device) * kl).sum(dim=0).mean()}


# ---- torch.distributions -------------------------------------------------------------------------


def _laplace_log_prob(self: Laplace, value: Any) -> Any:
    if not serves_alike(self.loc, self.scale, value):
        return NotImplemented
    if self._validate_args:
        self._validate_sample(value)
    return ops.laplace_log_prob(value, self.loc, shared(self.scale).log(), event_ndim=0)
