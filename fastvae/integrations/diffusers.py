"""diffusers' posteriors by fastvae's kernels: those of AutoencoderKL and of its relatives.

    import fastvae.integrations.diffusers
    fastvae.integrations.diffusers.patch()          # .undo() puts it back
    with fastvae.integrations.diffusers.patch(): ...

Served: `sample`, `kl` and `nll` of `DiagonalGaussianDistribution`, the posterior of images
[B, C, H, W] and of videos [B, C, T, H, W] (AutoencoderKLCogVideoX, AutoencoderKLWan,
AutoencoderKLHunyuanVideo, ...), and `sample` and `kl` of `OobleckDiagonalGaussianDistribution`,
that of audio. Values, shapes, dtypes and gradients are the original's: so the KL divergence of a
video is summed over C, T and H, and W is left, as diffusers does. Near posterior collapse it keeps
the digits that the original loses.

The noise is fastvae's, another than without the patch. `torch.manual_seed`, or the `generator` that
`sample` is given, decides it, and with a list of generators each decides that of one example: the
noise that it would have alone.

Passed on: `deterministic` posteriors, `kl(other)` of audio, whose formula in diffusers 0.42 is not
the KL divergence, and tensors that fastvae has no kernels for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .patching import Patch, eager_dtype, serves

__all__ = ["patch"]


def patch() -> Patch:
    """Turns it on; see the module.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """
    from diffusers.models.autoencoders import autoencoder_oobleck, vae

    patch = Patch()
    patch.replace(vae.DiagonalGaussianDistribution, "sample", _sample)
    patch.replace(vae.DiagonalGaussianDistribution, "kl", _kl)
    patch.replace(vae.DiagonalGaussianDistribution, "nll", _nll)
    audio = autoencoder_oobleck.OobleckDiagonalGaussianDistribution
    patch.replace(audio, "sample", _sample_audio)
    patch.replace(audio, "kl", _kl_audio)
    return patch


# ---- Images and videos ---------------------------------------------------------------------------


def _sample(self: Any, generator: Any = None) -> Any:
    if self.deterministic or not serves(self.mean, self.logvar):
        return NotImplemented
    # Autocast may have made sigma, and with it the sample, wider than the mean.
    logvar = self.logvar.to(torch.promote_types(self.mean.dtype, self.std.dtype))
    return _draw(self.mean, logvar, "logvar", generator)


def _kl(self: Any, other: Any = None) -> Any:
    q = self.mean, self.logvar
    p = () if other is None else (other.mean, other.logvar)
    if self.deterministic or getattr(other, "deterministic", False) or not serves(*q, *p):
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in (*q, *p)))
    if len(shape) < 4:  # the original's error
        return NotImplemented
    if len(shape) == 4:
        kl = ops.kl_divergence(*q, *p, event_ndim=3)
    else:  # the last dimension is left: a reduction of rows that are no rows in memory
        kl = ops.kl_divergence(*q, *p, event_ndim=0).sum(dim=[1, 2, 3])
    return kl.to(eager_dtype(*q, *p))


def _nll(self: Any, sample: Tensor, dims: int | Sequence[int] = (1, 2, 3)) -> Any:
    if self.deterministic or not serves(self.mean, self.logvar, sample):
        return NotImplemented
    n = sample.dim()
    summed = [dims] if isinstance(dims, int) else list(dims)
    if sample.shape != self.mean.shape or not summed or not all(-n <= d < n for d in summed):
        return NotImplemented
    summed = sorted(d % n for d in summed)
    event_ndim = len(summed) if summed == list(range(n - len(summed), n)) else 0
    log_prob = ops.gaussian_log_prob(sample, self.mean, self.logvar, event_ndim=event_ndim)
    if event_ndim == 0:
        log_prob = log_prob.sum(dim=summed)
    return -log_prob.to(eager_dtype(sample, self.mean, self.logvar))


# ---- Audio ---------------------------------------------------------------------------------------


def _sample_audio(self: Any, generator: Any = None) -> Any:
    if not serves(self.mean, self.std):
        return NotImplemented
    return _draw(self.mean, self.std, "std", generator)


def _kl_audio(self: Any, other: Any = None) -> Any:
    # To another posterior diffusers 0.42 adds ln var_q - ln var_p, where a KL divergence subtracts.
    if self.deterministic or other is not None or not serves(self.mean, self.std):
        return NotImplemented
    # Twice the divergence, summed over channels and averaged over all else.
    factor = 2 * self.mean.shape[1] / max(1, self.mean.numel())
    kl = ops.kl_divergence(self.mean, self.std, param="std").sum() * factor
    return kl.to(eager_dtype(self.mean, self.std))


# ---- Noise ---------------------------------------------------------------------------------------


def _draw(mean: Tensor, scale: Tensor, param: str, generator: Any) -> Any:
    """z, from PyTorch's generator, from one or from one an example, each of the CPU or of z's
    device."""
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if len(generators) == 1:
        (generator,) = generators
        if generator is None or generator.device == mean.device:
            return ops.rsample(mean, scale, param=param, generator=generator)
    elif len(generators) < len(mean):
        return NotImplemented
    if any(g.device.type not in ("cpu", mean.device.type) for g in generators):
        return NotImplemented
    if len(generators) == 1:
        seed = ops.draw_seed(generator).to(mean.device)
    else:
        seeds = [ops.draw_seed(g).to(mean.device) for g in generators[: len(mean)]]
        seed = torch.stack(seeds)
    return ops.rsample(mean, scale, param=param, seed=seed)
