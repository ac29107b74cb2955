"""The ops on `DTensor`s. Importing this module registers their sharding rules.

Rows stand apart from each other, so a batch that is sharded along dimension 0 stays where it is:
nothing is gathered, what is broadcast to all rows is replicated, and its gradient is a sum over
ranks. Noise depends on the number of a row; hence sampling stays local with one seed for each row,
as `draw_seed` gives them, and draws what one process draws from the same seeds. With one seed for
all rows the numbers are those of one process too, but the batch is gathered.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import ops
from .ops.layout import Schema, schemas

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
    seeds = ops.draw_seed(generator, like.device, like.shape[0])
    whole = DTensor.from_local(seeds, mesh, [Replicate()] * mesh.ndim, run_check=False)
    by_rows = [p if p == Shard(0) else Replicate() for p in like.placements]
    return whole.redistribute(placements=by_rows)  # from whole to sharded: each keeps its part


def _rules(
    schema: Schema,
    arguments: tuple[Any, ...],
    first: int,
    settings: dict[str, Any],
    outputs: int = 0,
) -> list[_Rule]:
    """What may lie how, of an op's arguments.

    Args:
        first: the position of the first operand, behind the upstream gradients.
        outputs: how many z and values are returned; 0: the gradients of the operands are.
    """
    operands = range(first, first + len(schema.operands))
    kept = range(operands.stop, operands.stop + (0 if outputs else schema.keeps))
    seed = kept.stop if schema.draws else None
    weight = kept.stop + schema.draws if schema.weighs else None
    samples = len(settings.get("sample_shape", ()))
    needs = settings.get("needs", 0)
    given = [k for k in operands if arguments[k] is not None]
    ndim = max(arguments[k].ndim for k in given)
    rows = max((arguments[k].shape[0] for k in given if arguments[k].ndim == ndim), default=1)
    if weight is not None and arguments[weight] is not None:
        given.append(weight)
    has_rows = {k: arguments[k].ndim == ndim and arguments[k].shape[0] == rows for k in given}
    if schema.pairs:
        rows = arguments[first].shape[0]
        has_rows = {k: k == first for k in given}
    if schema.items or schema.categoricals or schema.colours:
        has_rows = dict.fromkeys(given, True)

    def rule(sharded: bool) -> _Rule:
        def along_rows(dim: int = 0) -> Placement:
            return Shard(dim) if sharded else Replicate()

        inputs: list[Placement | None] = [None] * len(arguments)
        for k in given:
            inputs[k] = along_rows() if has_rows[k] else Replicate()
        if seed is not None:
            inputs[seed] = along_rows() if arguments[seed].ndim else Replicate()
        for k in range(first):
            if arguments[k] is not None:
                inputs[k] = along_rows(samples)
        of_rows = along_rows(int(settings.get("marginals", False)))  # dimensions come first
        for k in kept:
            inputs[k] = of_rows
        if outputs:
            return [*[along_rows(samples)] * outputs, *[of_rows] * schema.keeps], inputs
        grads: list[Placement | None] = []
        for i, k in enumerate(operands):
            if arguments[k] is None or not needs >> i & 1:
                grads.append(None)
            else:
                grads.append(Partial() if sharded and not has_rows[k] else inputs[k])
        return grads, inputs

    classes = schema.items or schema.categoricals  # which are the last dimension
    apart = (
        ndim > settings.get("event_ndim", 0) + classes
        and settings.get("packed_dim", -1) != 0
        and rows > 1
    )
    if settings.get("log_own") != settings.get("log_other"):  # a row has a component of its own
        apart = False
    noise_apart = seed is None or arguments[seed].ndim == 1
    return [rule(False), rule(True)] if apart and noise_apart else [rule(False)]


def _of_forward(schema: Schema, *arguments: Any) -> list[_Rule]:
    _, _, settings = schema.split(arguments)
    return _rules(schema, arguments, 0, settings, outputs=schema.outputs)


def _of_backward(schema: Schema, *arguments: Any) -> list[_Rule]:
    upstream, _, settings = schema.split(arguments, gradients=True)
    return _rules(schema, arguments, len(upstream), settings)


for _name, _schema in schemas():
    for _op, _rule in ((_name, _of_forward), (f"{_name}_backward", _of_backward)):
        register_sharding(getattr(torch.ops.fastvae, _op).default)(
            functools.partial(_rule, _schema)
        )
