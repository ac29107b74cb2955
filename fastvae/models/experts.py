"""Posteriors of several modalities made one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.arguments import tensor_arguments
from .distributions import DiagonalGaussian

__all__ = ["product_of_experts"]


def product_of_experts(
    mu: Tensor,
    logvar: Tensor,
    mask: Tensor | None = None,
    *,
    prior: bool = True,
    event_ndim: int | None = None,
) -> DiagonalGaussian:
    """The Gaussian proportional to the product of M Gaussian experts (Wu & Goodman 2018,
    "Multimodal generative models for scalable weakly-supervised learning").

    With precisions 1 / sigma_m^2 of the experts that are there, and that of N(0, I), which is 1,

        1 / sigma^2 = sum_m 1 / sigma_m^2,    mu = sigma^2 sum_m mu_m / sigma_m^2

    computed as a softmax of the -ln sigma_m^2, so that no precision overflows and none needs an
    epsilon. Sampling and KL divergence are then one pass: `product_of_experts(...).rsample_kl()`.

    Args:
        mu, logvar: [M, B, ...], or what broadcasts to it.
        mask: which experts are there, True or not 0; broadcast from the left: [M], [M, B] or more.
            What is not there may hold anything, NaN too.
        prior: whether N(0, I) is one more expert, which is always there. Without it an example that
            has no expert has no product: its mean is NaN.
        event_ndim: of the product; default all dimensions of [B, ...] but the first.

    Raises:
        TypeError: as `fastvae.kl_divergence`.
        ValueError: as there; the dimension of experts is missing, or `mask` does not fit.
    """
    (mu, logvar), shape = tensor_arguments(mu=mu, logvar=logvar)
    if len(shape) < 1:
        raise ValueError(f"mu has shape {list(mu.shape)}; want [experts, ...]")
    mu, log_precision = mu.expand(shape), -logvar.expand(shape)
    if mask is not None:
        if mask.dim() > len(shape) or any(n not in (1, shape[d]) for d, n in enumerate(mask.shape)):
            raise ValueError(
                f"mask has shape {list(mask.shape)}; want [experts] or more of the sizes of "
                f"{list(shape)}"
            )
        there = (mask != 0).reshape(*mask.shape, *(1,) * (len(shape) - mask.dim()))
        mu = torch.where(there, mu, 0)
        log_precision = torch.where(there, log_precision, -torch.inf)
    if prior:
        zeros = torch.zeros_like(mu[:1])
        mu, log_precision = torch.cat([mu, zeros]), torch.cat([log_precision, zeros])
    total = torch.logsumexp(log_precision, 0)
    mean = (torch.softmax(log_precision, 0) * mu).sum(0)
    return DiagonalGaussian(mean, -total, event_ndim=event_ndim)
