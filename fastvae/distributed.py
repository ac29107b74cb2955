"""The ops on `DTensor`s. Importing this module registers their sharding rules.

Rows stand apart from each other, so a batch that is sharded along dimension 0 stays where it is:
nothing is gathered, what is broadcast to all rows is replicated, and its gradient is a sum over
ranks. Noise depends on the number of a row; hence sampling stays local with one seed for each row,
as `draw_seed` gives them, and draws what one process draws from the same seeds. With one seed for
all rows the numbers are those of one process too, but the batch is gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import (
    backend,  # noqa: F401  loads the binary, which defines the ops
    functional,
)
from ._fake import PIXEL_LOG_PROBS

__all__ = ["draw_seed"]

_Rule = tuple[list[Placement | None], list[Placement | None]]  # of the outputs, of the arguments


def draw_seed(like: DTensor, generator: torch.Generator | None = None) -> DTensor:
    """One seed for each row of `like`, lying as its rows do.

    Every rank draws the seeds of all rows and keeps its own, so the ranks' generators must be in
    one state (`torch.manual_seed` with one number), and no rank waits for another.

    Args:
        like: of at least one dimension.
        generator: as in `fastvae.draw_seed`.

    Returns:
        int64, [rows].
    """
    mesh = like.device_mesh
    seeds = functional.draw_seed(generator, like.device, like.shape[0])
    whole = DTensor.from_local(seeds, mesh, [Replicate()] * mesh.ndim, run_check=False)
    by_rows = [p if p == Shard(0) else Replicate() for p in like.placements]
    return whole.redistribute(placements=by_rows)  # from whole to sharded: each keeps its part


def _rules(
    arguments: tuple[Any, ...],
    operands: list[int],
    *,
    event_ndim: int = 0,
    packed_dim: int = -1,
    seed: int | None = None,
    grad_z: int | None = None,
    grad_value: int | None = None,
    samples: int = 0,
    outputs: int = 0,
    needs: int = 0,
) -> list[_Rule]:
    """What may lie how, of an op's arguments; the numbers are positions among them.

    Args:
        outputs: how many z and values are returned; 0: the gradients of the operands are.
    """
    given = [k for k in operands if arguments[k] is not None]
    ndim = max(arguments[k].ndim for k in given)
    rows = max((arguments[k].shape[0] for k in given if arguments[k].ndim == ndim), default=1)
    has_rows = {k: arguments[k].ndim == ndim and arguments[k].shape[0] == rows for k in given}

    def rule(sharded: bool) -> _Rule:
        def along_rows(dim: int = 0) -> Placement:
            return Shard(dim) if sharded else Replicate()

        inputs: list[Placement | None] = [None] * len(arguments)
        for k in given:
            inputs[k] = along_rows() if has_rows[k] else Replicate()
        if seed is not None:
            inputs[seed] = along_rows() if arguments[seed].ndim else Replicate()
        if grad_z is not None:
            inputs[grad_z] = along_rows(samples)
        if grad_value is not None:
            inputs[grad_value] = along_rows(samples)
        if outputs:
            return [along_rows(samples)] * outputs, inputs
        grads: list[Placement | None] = []
        for i, k in enumerate(operands):
            if arguments[k] is None or not needs >> i & 1:
                grads.append(None)
            else:
                grads.append(Partial() if sharded and not has_rows[k] else inputs[k])
        return grads, inputs

    apart = ndim > event_ndim and packed_dim != 0 and rows > 1
    noise_apart = seed is None or arguments[seed].ndim == 1
    return [rule(False), rule(True)] if apart and noise_apart else [rule(False)]


def _rsample(*a: Any) -> list[_Rule]:
    return _rules(a, [0, 1], seed=2, packed_dim=a[4], samples=len(a[5]), outputs=1)


def _rsample_backward(*a: Any) -> list[_Rule]:
    return _rules(a, [1, 2], grad_z=0, seed=3, packed_dim=a[5], samples=len(a[6]), needs=a[7])


def _kl_divergence(*a: Any) -> list[_Rule]:
    return _rules(a, [0, 1, 2, 3], packed_dim=a[5], event_ndim=a[6], outputs=1)


def _kl_divergence_backward(*a: Any) -> list[_Rule]:
    return _rules(a, [1, 2, 3, 4], grad_value=0, packed_dim=a[6], event_ndim=a[7], needs=a[8])


def _rsample_kl(*a: Any) -> list[_Rule]:
    return _rules(a, [0, 1, 2, 3], seed=4, packed_dim=a[6], event_ndim=a[7], outputs=2)


def _rsample_kl_backward(*a: Any) -> list[_Rule]:
    return _rules(
        a,
        [2, 3, 4, 5],
        grad_z=0,
        grad_value=1,
        seed=6,
        packed_dim=a[8],
        event_ndim=a[9],
        needs=a[10],
    )


def _rsample_log_ratio(*a: Any) -> list[_Rule]:
    return _rules(
        a,
        [0, 1, 2, 3],
        seed=4,
        packed_dim=a[6],
        event_ndim=a[7],
        samples=len(a[8]),
        outputs=2,
    )


def _rsample_log_ratio_backward(*a: Any) -> list[_Rule]:
    return _rules(
        a,
        [2, 3, 4, 5],
        grad_z=0,
        grad_value=1,
        seed=6,
        packed_dim=a[8],
        event_ndim=a[9],
        samples=len(a[10]),
        needs=a[12],
    )


def _gaussian_log_prob(*a: Any) -> list[_Rule]:
    return _rules(a, [0, 1, 2], event_ndim=a[5], outputs=1)


def _gaussian_log_prob_backward(*a: Any) -> list[_Rule]:
    return _rules(a, [1, 2, 3], grad_value=0, event_ndim=a[6], needs=a[7])


def _log_prob(count: int, *a: Any) -> list[_Rule]:
    return _rules(a, list(range(count)), event_ndim=a[-1], outputs=1)


def _log_prob_backward(count: int, *a: Any) -> list[_Rule]:
    operands = list(range(1, count + 1))
    return _rules(a, operands, grad_value=0, event_ndim=a[-2], needs=a[-1])


_RULES: dict[str, Callable[..., list[_Rule]]] = {
    function.__name__[1:]: function
    for function in (
        _rsample,
        _rsample_backward,
        _kl_divergence,
        _kl_divergence_backward,
        _rsample_kl,
        _rsample_kl_backward,
        _rsample_log_ratio,
        _rsample_log_ratio_backward,
        _gaussian_log_prob,
        _gaussian_log_prob_backward,
    )
}
for _name, _count in PIXEL_LOG_PROBS.items():
    _RULES[_name] = functools.partial(_log_prob, _count)
    _RULES[f"{_name}_backward"] = functools.partial(_log_prob_backward, _count)

for _name, _rule in _RULES.items():
    if _op := getattr(torch.ops.fastvae, _name, None):
        register_sharding(_op.default)(_rule)
