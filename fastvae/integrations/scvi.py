"""scvi-tools' counts, Gaussians and KL divergences by fastvae's kernels.

    import fastvae.integrations.scvi
    fastvae.integrations.scvi.patch()          # before training; .undo() puts it back
    with fastvae.integrations.scvi.patch(): ...

Served: `log_prob` of NegativeBinomial, ZeroInflatedNegativeBinomial, NegativeBinomialMixture and
Poisson of scvi.distributions; `rsample` of torch.distributions.Normal, whose noise is then
fastvae's, seeded by `torch.manual_seed` all the same; and the KL divergence of two of these. That
is what SCVI, SCANVI, TOTALVI and LinearSCVI compute. The Gaussian's methods are those of torch,
for whoever calls them while the patch is on. All else goes to the original.

The mean keeps scvi-tools' epsilon of 10^-8, without which a softmax that underflows would make an
observed count impossible; the other epsilons, and the cancellation of the gamma functions, are
gone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import softplus

from .. import ops
from .patching import Patch, serves, shared

__all__ = ["patch"]

_EPS = 1e-8


def patch() -> Patch:
    """Turns it on; see the module.

    Raises:
        ModuleNotFoundError: scvi-tools is not installed.
    """
    from scvi import distributions as scvi

    patch = Patch()
    patch.replace(scvi.ZeroInflatedNegativeBinomial, "log_prob", _zero_inflated)
    patch.replace(scvi.NegativeBinomial, "log_prob", _negative_binomial)
    patch.replace(scvi.NegativeBinomialMixture, "log_prob", _mixture)
    patch.replace(scvi.Poisson, "log_prob", _poisson)
    patch.replace(Normal, "rsample", _rsample)
    patch.replace_kl(Normal, Normal, _kl)
    return patch


def _warn_outside_support(distribution: Any, value: Tensor) -> None:
    try:
        distribution._validate_sample(value)
    except ValueError:
        from scvi import settings

        warnings.warn(
            "The value argument must be within the support of the distribution",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )


def _negative_binomial(self: Any, value: Tensor) -> Any:
    if not serves(self.mu, self.theta, value):
        return NotImplemented
    if self._validate_args:
        _warn_outside_support(self, value)
    return ops.negative_binomial_log_prob(
        value, shared(self.mu) + _EPS, shared(self.theta), event_ndim=0
    )


def _zero_inflated(self: Any, value: Tensor) -> Any:
    if not serves(self.mu, self.theta, self.zi_logits, value):
        return NotImplemented
    _warn_outside_support(self, value)
    return ops.zero_inflated_negative_binomial_log_prob(
        value, shared(self.mu) + _EPS, shared(self.theta), shared(self.zi_logits), event_ndim=0
    )


def _mixture(self: Any, value: Tensor) -> Any:
    theta2 = self.theta1 if self.theta2 is None else self.theta2
    if not serves(self.mu1, self.mu2, self.theta1, theta2, self.mixture_logits, value):
        return NotImplemented
    _warn_outside_support(self, value)
    first, second = (
        ops.negative_binomial_log_prob(value, shared(mu) + _EPS, shared(theta), event_ndim=0)
        for mu, theta in ((self.mu1, self.theta1), (self.mu2, theta2))
    )
    logits = self.mixture_logits
    return torch.logaddexp(first, second - logits) - softplus(-logits)


def _poisson(self: Any, value: Tensor) -> Any:
    if not serves(self.rate, value):
        return NotImplemented
    if self._validate_args:
        self._validate_sample(value)
    return ops.poisson_log_prob(value, shared(self.rate), event_ndim=0)


def _rsample(self: Normal, sample_shape: Any = ()) -> Any:
    if not serves(self.loc, self.scale):
        return NotImplemented
    return ops.rsample(self.loc, self.scale, param="std", sample_shape=tuple(sample_shape))


def _kl(p: Normal, q: Normal) -> Any:
    if not serves(p.loc, p.scale, q.loc, q.scale):
        return NotImplemented
    return ops.kl_divergence(p.loc, p.scale, q.loc, q.scale, param="std", event_ndim=0)
