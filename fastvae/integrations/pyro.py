"""Pyro's Normals by fastvae's kernels.

    import fastvae.integrations.pyro
    fastvae.integrations.pyro.patch()          # .undo() puts it back
    with fastvae.integrations.pyro.patch(): ...

Served: samples and log-probabilities of `dist.Normal` and of its `to_event`, in every ELBO, and the
KL divergences that `TraceMeanField_ELBO` takes, also of masked sites. Pyro's distributions have
PyTorch's methods, so this is the patch of `fastvae.integrations.torch_distributions`, over the
divergences that Pyro registers for itself; what is said there holds. The Jit ELBOs trace, and so
keep the originals.
"""

from __future__ import annotations

from . import torch_distributions
from .patching import Patch

__all__ = ["patch"]


def patch() -> Patch:
    """Turns it on; see the module.

    Raises:
        ModuleNotFoundError: Pyro is not installed.
    """
    import pyro.distributions  # noqa: F401  which registers divergences of its own, once

    return torch_distributions.patch()
