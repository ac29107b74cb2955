"""pythae's losses by fastvae's kernels.

    import fastvae.integrations.pythae
    fastvae.integrations.pythae.patch()          # before training; .undo() puts it back
    with fastvae.integrations.pythae.patch(): ...

Served, with the values, shapes, dtypes and gradients of the original:

- `loss_function` of VAE, BetaVAE, DisentangledBetaVAE and BetaTCVAE;
- `_log_p_z` of VAMP, a mixture;
- the kernels of INFOVAE_MMD's and WAE_MMD's maximum mean discrepancy, whose distances are computed
  once for all scales;
- `_sample_gauss` of all of these and of IWAE, CIWAE, MIWAE, PIWAE, FactorVAE, VAE_LinNF, VAE_IAF
  and VAEGAN, from 16,384 elements on: it returns the noise too, and drawing that is all there is
  to gain.

The noise is then fastvae's, another than without the patch, decided by `torch.manual_seed` all the
same. Reconstruction losses stay PyTorch's, which has one fast op for each.

Passed on: half types, what has no kernels, fewer elements. All other models stay pythae's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.mixtures import _pairs, _weights
from ..ops.op import OPS
from .patching import Patch, serves_alike

__all__ = ["patch"]

_SMALL = 16_384  # elements, below which two calls take as long as PyTorch's three


def patch() -> Patch:
    """Turns it on; see the module.

    Raises:
        ModuleNotFoundError: pythae is not installed.
    """
    from pythae import models

    patch = Patch()
    patch.replace(models.VAE, "loss_function", _vae)
    patch.replace(models.BetaVAE, "loss_function", _beta_vae)
    patch.replace(models.DisentangledBetaVAE, "loss_function", _disentangled)
    patch.replace(models.BetaTCVAE, "loss_function", _beta_tc_vae)
    patch.replace(models.VAMP, "_log_p_z", _vamp_prior)
    for model in (models.INFOVAE_MMD, models.WAE_MMD):
        patch.replace(model, "imq_kernel", _imq_kernel)
        patch.replace(model, "rbf_kernel", _rbf_kernel)
    sampling = (
        "VAE BetaVAE DisentangledBetaVAE BetaTCVAE VAMP INFOVAE_MMD IWAE CIWAE MIWAE PIWAE "
        "FactorVAE VAE_LinNF VAE_IAF VAEGAN"
    )
    for name in sampling.split():
        patch.replace(getattr(models, name), "_sample_gauss", _sample_gauss)
    return patch


def _sample_gauss(self: Any, mu: Any, std: Any) -> Any:
    if not serves_alike(mu, std) or std.numel() < _SMALL:
        return NotImplemented
    eps = ops.rsample(std.new_zeros(()).expand(std.shape), std.new_zeros(()))
    return mu + eps * std, eps


# ---- Losses --------------------------------------------------------------------------------------


def _served(self: Any, *tensors: Any) -> bool:
    return serves_alike(*tensors) and self.model_config.reconstruction_loss in ("mse", "bce")


def _reconstruction(self: Any, recon_x: Tensor, x: Tensor) -> Tensor:
    """Of each example."""
    found, wanted = recon_x.reshape(len(x), -1), x.reshape(len(x), -1)
    if self.model_config.reconstruction_loss == "mse":
        return 0.5 * F.mse_loss(found, wanted, reduction="none").sum(-1)
    return F.binary_cross_entropy(found, wanted, reduction="none").sum(-1)


def _vae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Any:
    return _elbo(self, recon_x, x, mu, log_var, 1.0)


def _beta_vae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Any:
    return _elbo(self, recon_x, x, mu, log_var, self.beta)


def _elbo(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, beta: float) -> Any:
    if not _served(self, mu, log_var):
        return NotImplemented
    distortion = _reconstruction(self, recon_x, x).mean(0)
    rate = ops.kl_divergence(mu, log_var, event_ndim=1).mean(0)
    return distortion + beta * rate, distortion, rate


def _disentangled(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int
) -> Any:
    if not _served(self, mu, log_var):
        return NotImplemented
    distortion = _reconstruction(self, recon_x, x).mean(0)
    kl = ops.kl_divergence(mu, log_var, event_ndim=1)
    away = (kl - self.C * min(epoch / (self.warmup_epoch + 1), 1)).abs().mean(0)
    return distortion + self.beta * away, distortion, kl.mean(0)


# ---- The aggregate posterior ---------------------------------------------------------------------


def _beta_tc_vae(
    self: Any,
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    log_var: Tensor,
    z: Tensor,
    dataset_size: int,
) -> Any:
    batch = len(z)
    if not _served(self, mu, log_var, z) or z.dim() != 2 or not 2 <= batch <= dataset_size:
        return NotImplemented
    if self.use_mss:
        joint, marginals = _stratified(z, mu, log_var, dataset_size)
    else:
        joint, marginals = ops.aggregate_log_prob(
            z, mu, log_var, dataset_size=dataset_size, estimator="mws"
        )
    conditional = ops.gaussian_log_prob(z, mu, log_var)
    prior = ops.gaussian_log_prob(z, 0.0)
    terms = (
        self.alpha * (conditional - joint)
        + self.beta * (joint - marginals)
        + self.gamma * (marginals - prior)
    )
    rate = terms.mean(0)
    distortion = _reconstruction(self, recon_x, x).mean(0)
    return distortion + rate, distortion, rate


def _stratified(z: Tensor, mu: Tensor, log_var: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """ln q(z) and the sum of its marginals with pythae's weights, which are one row for all
    examples but the last but one."""
    batch = len(z)
    rest = batch - 1
    weights = z.new_full((batch,), 1 / rest)
    weights[0], weights[1] = 1 / size, (size - rest) / (size * rest)
    other = weights.clone()
    other[0] = (size - rest) / (size * rest)
    odd = batch - 2
    found = []
    for marginals in (False, True):
        rows, row = (
            _mixture(part, mu, log_var, log_w, marginals)
            for part, log_w in ((z, weights.log()), (z[odd : odd + 1], other.log()))
        )
        found.append(torch.cat([rows[:odd], row, rows[odd + 1 :]]))
    return found[0], found[1]


def _mixture(z: Tensor, mu: Tensor, log_var: Tensor, log_w: Tensor, marginals: bool) -> Tensor:
    operands, settings = _pairs(z, mu, log_var, log_w, "logvar", None, None)
    value: Tensor = OPS["mixture_log_prob"].run(
        operands, settings | _weights(0.0, 0.0, marginals=marginals)
    )
    return value


# ---- VampPrior -----------------------------------------------------------------------------------


def _vamp_prior(self: Any, z: Tensor) -> Any:
    if not serves_alike(z) or z.dim() != 2:
        return NotImplemented
    shape = (self.number_components, *self.model_config.input_dim)
    encoded = self.encoder(self.pseudo_inputs(self.idle_input.to(z.device)).reshape(shape))
    mu, log_var = encoded.embedding, encoded.log_covariance
    # pythae leaves ln 2 pi out, here and in ln q(z | x).
    return ops.mixture_log_prob(z, mu, log_var) + 0.5 * z.shape[1] * math.log(2 * math.pi)


# ---- Maximum mean discrepancy --------------------------------------------------------------------


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """[n, m] squared distances: minus twice the logarithms of normal densities without ln 2 pi."""
    return -2 * ops.pairwise_log_prob(a, b, 0.0) - a.shape[1] * math.log(2 * math.pi)


def _bandwidth(self: Any) -> float:
    return 2.0 * self.model_config.latent_dim * self.model_config.kernel_bandwidth**2


def _imq_kernel(self: Any, z1: Any, z2: Any) -> Any:
    if not serves_alike(z1, z2) or z1.dim() != 2 or z2.dim() != 2:
        return NotImplemented
    squares, base = _squares(z1, z2), _bandwidth(self)
    kernel = torch.zeros_like(squares)
    for scale in self.scales:
        kernel = kernel + scale * base / (scale * base + squares)
    return kernel


def _rbf_kernel(self: Any, z1: Any, z2: Any) -> Any:
    if not serves_alike(z1, z2) or z1.dim() != 2 or z2.dim() != 2:
        return NotImplemented
    return torch.exp(-_squares(z1, z2) / _bandwidth(self))
