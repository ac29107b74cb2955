"""Fused kernels, and the rest of what it takes, for training variational autoencoders."""

from . import reference
from .backend import info, use_backend
from .distributions import DiagonalGaussian
from .functional import draw_seed, gaussian_log_prob, kl_divergence, rsample, rsample_kl
from .vae import VAE

__all__ = [
    "VAE",
    "DiagonalGaussian",
    "draw_seed",
    "gaussian_log_prob",
    "info",
    "kl_divergence",
    "reference",
    "rsample",
    "rsample_kl",
    "use_backend",
]
