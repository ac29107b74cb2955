"""Rows of logits over items: one chosen item, or how often each was chosen.

    ln p_i = l_i - ln sum_j e^{l_j}

Values are nats. A row is read twice, and no tensor of all ln p is made; what backward makes is the
gradient. Dtypes promote, half types are computed and summed in float32, and so are the values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from . import eager
from .arguments import tensor_arguments
from .declare import declare, loss_of
from .elements import event_sum
from .op import Request

__all__ = [
    "categorical_log_prob",
    "categorical_nll_loss",
    "chosen_log_prob",
    "multinomial_log_prob",
    "multinomial_nll_loss",
]


def _items(logits: Tensor) -> int:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; want [..., items], one at least")
    return logits.shape[-1]


# ---- How often each item was chosen --------------------------------------------------------------


def _multinomial(x: Tensor, logits: Tensor) -> Tensor:
    log_p = log_softmax(logits, -1)
    return (x * torch.where((x == 0) & (log_p == -math.inf), 0, log_p)).sum(-1)


def _multinomial_eager(x: Tensor, logits: Tensor) -> Tensor:
    return _multinomial(x, logits) if x.requires_grad else eager.multinomial(x, logits)


@declare(_multinomial, eager=_multinomial_eager, whole=True)
def multinomial_log_prob(x: Tensor, logits: Tensor) -> Request:
    """sum_i x_i ln softmax(logits)_i: of counts, or of soft targets.

    What a recommender's decoder is trained by (Liang et al. 2018, "Variational autoencoders for
    collaborative filtering"), and, for x that sums to 1, the cross-entropy. The multinomial
    coefficient, a constant of the data, is left out. An item with x = 0 counts nothing even if its
    probability is 0.

    Args:
        x: [..., items], or what broadcasts against logits.
        logits: [..., items].

    Returns:
        Nats, of shape `logits.shape[:-1]`; float32 for half types.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not broadcast, or no items.
    """
    (x, logits), shape = tensor_arguments(x=x, logits=logits)
    _items(logits)
    return (x.expand(shape), logits.expand(shape)), {}


multinomial_nll_loss = loss_of(multinomial_log_prob)


# ---- One chosen item -----------------------------------------------------------------------------


def _chosen(x: Tensor, logits: Tensor) -> Tensor:
    return log_softmax(logits, -1).gather(-1, x.unsqueeze(-1)).squeeze(-1)


@declare(_chosen, whole=True)
def chosen_log_prob(x: Tensor, logits: Tensor) -> Request:
    """ln softmax(logits) at the item x: `categorical_log_prob` of every x alone."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        dtype = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x has dtype {dtype}; want torch.int64, class indices")
    (logits,), shape = tensor_arguments(logits=logits)
    _items(logits)
    try:
        rows = shape[:-1]
        if x.shape != rows:
            rows = torch.broadcast_shapes(x.shape, rows)
    except RuntimeError:
        raise ValueError(
            f"shapes do not broadcast: x {list(x.shape)}, logits {list(shape)} without its classes"
        ) from None
    return (x.expand(rows), logits.expand(*rows, shape[-1])), {}


def categorical_log_prob(x: Tensor, logits: Tensor, *, event_ndim: int | None = None) -> Tensor:
    """ln softmax(logits) at the class x; or of soft targets, sum_i x_i ln softmax(logits)_i.

    Args:
        x: int64 class indices, below the number of classes; or, of a floating-point dtype, the
            classes' probabilities, with the classes as last dimension.
        logits: of x's shape with the classes as last dimension, or with more leading dimensions.
        event_ndim: how many trailing dimensions before the classes are summed; default all but the
            first.

    Returns:
        Nats, of shape `logits.shape[:-1 - event_ndim]`.

    Raises:
        TypeError: x is neither int64 nor floating-point.
        ValueError: shapes that do not broadcast.
        RuntimeError: a class that there is not; on a GPU the value is NaN instead.
    """
    soft = isinstance(x, Tensor) and x.is_floating_point()
    log_prob = multinomial_log_prob(x, logits) if soft else chosen_log_prob(x, logits)
    return event_sum(log_prob, log_prob.shape, event_ndim)


categorical_nll_loss = loss_of(categorical_log_prob)
