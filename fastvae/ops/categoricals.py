"""Categorical latents, as world models have them: groups of classes, each class with a logit.

    p_i = (1 - u) softmax(l)_i + u / classes

The last dimension is that of the classes, those before it are groups, and `uniform_mix` is u: it
keeps every probability away from 0 (DreamerV3 has 0.01, DreamerV2 none). A logit of -inf masks a
class, which has the uniform part alone. Dtypes promote, half types are computed and summed in
float32, and values are nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from . import eager
from .arguments import event_dims, tensor_arguments
from .declare import declare
from .elements import sum_last
from .noise import Generators, make_seed
from .op import Request

__all__ = ["balanced_categorical_kl_divergence", "straight_through_categorical"]


def _checked(
    uniform_mix: float, *, logits: Tensor, **others: Tensor
) -> tuple[list[Tensor], torch.Size]:
    """Tensors of one dtype and shape."""
    if not 0 <= uniform_mix < 1:
        raise ValueError(f"uniform_mix is {uniform_mix}; want 0 or more, below 1")
    tensors, shape = tensor_arguments(logits=logits, **others)
    if not shape or shape[-1] == 0:
        raise ValueError(f"logits has shape {list(shape)}; want [..., classes], one at least")
    return [t.expand(shape) for t in tensors], shape


def _log_mixed(logits: Tensor, uniform_mix: float) -> Tensor:
    """ln((1 - u) softmax(l) + u / classes)"""
    log_p = log_softmax(logits, -1)
    if uniform_mix == 0:
        return log_p
    each = log_p.new_tensor(math.log(uniform_mix / logits.shape[-1]))
    return torch.logaddexp(log_p + math.log1p(-uniform_mix), each)


# ---- Sampling ------------------------------------------------------------------------------------


def _straight_through(logits: Tensor, *, uniforms: Tensor, uniform_mix: float) -> Tensor:
    """The first class whose probability and those before it exceed a uniform number; of those below
    u, one of all classes. One-hot, with the gradient of p."""
    classes = logits.shape[-1]
    # In double, so that nearly always the class is that of the kernels, which sum exactly.
    relative = torch.exp((logits - logits.amax(-1, keepdim=True)).double()).detach()
    until = relative.cumsum(-1)
    within = uniforms.unsqueeze(-1)
    rest = (within - uniform_mix) / (1 - uniform_mix)
    chosen = (until <= rest * until[..., -1:]).sum(-1, keepdim=True)
    if uniform_mix > 0:
        of_all = (within / uniform_mix * classes).long().clamp(max=classes - 1)
        chosen = torch.where(within < uniform_mix, of_all, chosen)
    one_hot = (torch.arange(classes, device=logits.device) == chosen).to(logits.dtype)
    p = (1 - uniform_mix) * torch.softmax(logits, -1)
    return one_hot + (p - p.detach())


@declare(_straight_through, whole=True)
def straight_through_categorical(
    logits: Tensor,
    *,
    uniform_mix: float = 0.0,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
) -> Request:
    """Draws one class of each group, one-hot, with the gradient of its probabilities (Bengio et al.
    2013, "Estimating or propagating gradients through stochastic neurons"; Hafner et al. 2021,
    "Mastering Atari with discrete world models").

    The value is the one-hot sample z; the gradient is that of p, as if z were p + stop(z - p):

        dL/dl_i = (1 - u) s_i (g_i - sum_j g_j s_j),  s = softmax(l)

    One uniform number decides a group: the word that would be the noise of column k belongs to the
    k-th group of a row. One seed draws the same classes on every device, instruction set and number
    of threads. A group whose softmax is NaN is NaN.

    Args:
        logits: [..., classes]; the first dimension, if it is another, has the rows.
        uniform_mix: see the module's documentation.
        seed, generator: as in `rsample`.

    Returns:
        z, of the shape and dtype of `logits`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: no classes, a number out of range, or a wrong seed.
    """
    (logits,), shape = _checked(uniform_mix, logits=logits)
    return (logits,), {
        "seed": make_seed(seed, generator, logits, shape[:-1]),
        "uniform_mix": float(uniform_mix),
    }


# ---- KL divergence -------------------------------------------------------------------------------


def _kl(logits: Tensor, prior_logits: Tensor, uniform_mix: float) -> Tensor:
    """sum_i q_i (p_i / q_i - 1 - ln(p_i / q_i)), which is KL(q || p) and never below 0."""
    log_q, log_p = _log_mixed(logits, uniform_mix), _log_mixed(prior_logits, uniform_mix)
    q, p = log_q.exp(), log_p.exp()
    # Of classes that q never has p is left.
    log_ratio = torch.where(log_q == -math.inf, 1, log_p - log_q)
    near = log_ratio < 1
    small = torch.where(near, log_ratio, 0)
    terms = torch.where(near, q * (torch.expm1(small) - small), p - q * (1 + log_ratio))
    return terms.sum(-1)


def _balanced_groups(
    logits: Tensor, prior_logits: Tensor, balance: float, uniform_mix: float
) -> Tensor:
    to_p = _kl(logits.detach(), prior_logits, uniform_mix)
    to_q = _kl(logits, prior_logits.detach(), uniform_mix)
    return balance * to_p + (1 - balance) * to_q


def _balanced_groups_eager(
    logits: Tensor, prior_logits: Tensor, balance: float, uniform_mix: float
) -> Tensor:
    define = partial(_balanced_groups, balance=balance, uniform_mix=uniform_mix)
    return eager.balanced_categorical_kl(define, logits, prior_logits, balance, uniform_mix)


def _balanced_kl(
    logits: Tensor,
    prior_logits: Tensor,
    *,
    balance: float,
    uniform_mix: float,
    free_nats: float,
    event_ndim: int,
    of_groups: Callable[..., Tensor] = _balanced_groups,
) -> Tensor:
    """max(alpha KL(stopped q || p) + (1 - alpha) KL(q || stopped p), free nats)"""
    kl = sum_last(of_groups(logits, prior_logits, balance, uniform_mix), event_ndim)
    return kl.clamp(min=free_nats) if free_nats > 0 else kl


@declare(_balanced_kl, eager=partial(_balanced_kl, of_groups=_balanced_groups_eager), whole=True)
def balanced_categorical_kl_divergence(
    logits: Tensor,
    prior_logits: Tensor,
    *,
    balance: float = 0.8,
    uniform_mix: float = 0.0,
    free_nats: float = 0.0,
    event_ndim: int | None = None,
) -> Request:
    """KL(q || p) of categoricals, summed over groups, with `balance` of its gradient for the prior
    and the rest for the posterior (Hafner et al. 2021, "Mastering Atari with discrete world
    models").

    Value and gradients are those of

        max(balance KL(stop(q) || p) + (1 - balance) KL(q || stop(p)), free_nats)

    in one pass forward and one backward. DreamerV2 has a balance of 0.8. DreamerV3's weights of 0.5
    for p and 0.1 for q, each with one free nat, are 0.6 times a balance of 5/6, with
    `uniform_mix=0.01` and `free_nats=1`.

    Without a uniform part, a class that p never has, and q has, makes the value infinite; one that
    q never has costs nothing. The value keeps a relative error below 1e-6 where q and p are near,
    and is never negative.

    Args:
        logits: [..., classes], of q.
        prior_logits: of p, broadcasting against those of q.
        balance: from 0 to 1.
        uniform_mix: of both distributions; see the module's documentation.
        free_nats: what the values, sums over an event, are at the least. A row below has no
            gradient.
        event_ndim: how many trailing dimensions before the classes are summed; default all but the
            first.

    Returns:
        Nats, of shape `logits.shape[:-1 - event_ndim]`; float32 for half types.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not broadcast, no classes, or numbers out of range.
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance is {balance}; want 0 to 1")
    if not 0 <= free_nats < math.inf:
        raise ValueError(f"free_nats is {free_nats}; want 0 or more")
    operands, shape = _checked(uniform_mix, logits=logits, prior_logits=prior_logits)
    return operands, {
        "balance": float(balance),
        "uniform_mix": float(uniform_mix),
        "free_nats": float(free_nats),
        "event_ndim": event_dims(event_ndim, len(shape) - 1),
    }
