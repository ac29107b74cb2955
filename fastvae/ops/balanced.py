"""A KL divergence whose gradient is shared out between posterior and prior, for world models."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import eager
from .arguments import (
    TensorLike,
    check_bound,
    check_param,
    event_dims,
    weight_argument,
)
from .bounds import Bound, Raised
from .declare import declare
from .elements import log_variance
from .forms import read_gaussians
from .gaussian import _kl
from .op import Request

__all__ = ["balanced_kl_divergence"]


def _balanced_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    *,
    param: str,
    balance: float,
) -> Tensor:
    """alpha KL(stopped q || p) + (1 - alpha) KL(q || stopped p)"""
    to_p = _kl(mu.detach(), logvar.detach(), prior_mu, prior_logvar, param=param)
    to_q = _kl(mu, logvar, prior_mu.detach(), prior_logvar.detach(), param=param)
    return balance * to_p + (1 - balance) * to_q


def _balanced_kl_eager(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    *,
    param: str,
    balance: float,
    event: torch.Size,
) -> Tensor:
    lv, prior_lv = log_variance(logvar, param), log_variance(prior_logvar, param)
    mu, lv, prior_mu, prior_lv = torch.broadcast_tensors(mu, lv, prior_mu, prior_lv)
    define = partial(_balanced_kl, param="logvar", balance=balance)
    return eager.kl(define, mu, lv, prior_mu, prior_lv, len(event), balance)


@declare(_balanced_kl, eager=_balanced_kl_eager)
def balanced_kl_divergence(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike,
    prior_logvar: TensorLike,
    *,
    balance: float = 0.8,
    param: str = "logvar",
    prior_param: str | None = None,
    min_std: float = 0.0,
    bound: Bound | Raised | None = None,
    event_ndim: int | None = None,
    weight: TensorLike | None = None,
) -> Request:
    """KL(q || p), with `balance` of its gradient for the prior and the rest for the posterior
    (Hafner et al. 2021, "Mastering Atari with discrete world models").

    Value and gradients are those of

        balance KL(stop(q) || p) + (1 - balance) KL(q || stop(p))

    in one pass forward and one backward. DreamerV2 has a balance of 0.8; DreamerV3's weights of 0.5
    for p and 0.1 for q are 0.6 times a balance of 5/6.

    Free nats are a matter of what follows: `.clamp(min=1).mean()` clips each row, as DreamerV3
    does, so that rows below have no gradient; `.mean().clamp(min=1)` clips the mean, as PlaNet and
    DreamerV1 do.

    Args:
        mu, logvar, prior_mu, prior_logvar: q and p; all else as in `kl_divergence`.
        balance: from 0 to 1.

    Returns:
        Nats, of shape `mu.shape[:-event_ndim]`.

    Raises:
        ValueError: also for a `balance` out of range.
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance is {balance}; want 0 to 1")
    for name, value in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        if value is None:
            raise TypeError(f"{name} is None; want a tensor or a number")
    operands, shape, form, bound = read_gaussians(
        mu, logvar, prior_mu, prior_logvar, param, prior_param, min_std, bound
    )
    return operands, {
        "weight": weight_argument(weight, operands[0], shape),
        "balance": float(balance),
        "param": check_param(form),
        "packed_dim": -1,
        "event_ndim": event_dims(event_ndim, len(shape)),
        "bound": check_bound(bound, form),
    }
