"""The random tensors of a case: several sets, to be used in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Case

__all__ = ["Inputs", "Level", "make_inputs"]

# A set that is smaller than a 16th of the last cache is still there, in real use, when the op is
# called: an encoder or a decoder has just written it.
_MOST_SETS, _FEWEST_SETS = 32, 2


@dataclass(frozen=True)
class Level:
    """What one call of the op is given."""

    leaves: tuple[Tensor, ...]
    """In the order of `Op.inputs`; in halves, each pair is one tensor."""
    upstream: tuple[Tensor, ...]
    """The gradients of `Op.outputs`, none where that is a loss."""

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """The leaves whose gradients are asked for."""
        return tuple(leaf for leaf in self.leaves if leaf.requires_grad)


@dataclass(frozen=True)
class Inputs:
    """Sets of levels, of which each call takes the next."""

    sets: tuple[tuple[Level, ...], ...]
    in_cache: bool
    """Whether they are few enough to stay in the last cache."""


def make_inputs(case: Case, cache_bytes: int, seed: int = 0, *, warm: bool = False) -> Inputs:
    """Enough sets that none is still in cache when its turn comes, unless a set is small; if
    `warm`, only two.
    """
    tensors = (*case.op.inputs, *(f"grad_{name}" for name in case.op.outputs))
    each = case.bytes_of(tensors)
    needed = math.ceil(2 * cache_bytes / each)
    generator = torch.Generator(case.device).manual_seed(seed)
    count = _FEWEST_SETS if warm or needed > _MOST_SETS else max(needed, _FEWEST_SETS)
    in_cache = count * each <= cache_bytes
    return Inputs(tuple(_make_set(case, generator) for _ in range(count)), in_cache)


def _counts(
    case: Case, size: tuple[int, ...], normals: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Of genes whose means differ by some e, a ninth of them above 0; dispersions around 1."""
    given = dict(zip(case.op.inputs, (t.double() for t in normals), strict=True))
    gene = torch.randn(size[1:], generator=generator, device=case.device, dtype=torch.float64)
    given["mean"] = torch.exp(0.7 * given["mean"] + gene - 2.8)
    rate = given["mean"]
    if "theta" in given:
        given["theta"] = torch.exp(given["theta"])
        gamma = torch._standard_gamma(given["theta"].expand(size), generator)
        rate = rate * gamma / given["theta"]
    given["x"] = torch.poisson(rate, generator)
    return [t.to(case.dtype) for t in given.values()]


def _make_set(case: Case, generator: torch.Generator) -> tuple[Level, ...]:
    def normal(operand: str, size: tuple[int, ...]) -> Tensor:
        t = torch.randn(
            case.op.size(operand, size), generator=generator, device=case.device, dtype=case.dtype
        )
        if operand == "weight":  # a mask of which a sixth is left out
            return (t > -1).to(t.dtype)
        return t.mul_(0.5) if operand.endswith(("logvar", "log_scale")) else t

    def upstream(operand: str, size: tuple[int, ...]) -> Tensor:
        g = normal(operand, size)
        # Of one sign for a sum over an event, so that gradients summed over rows do not cancel.
        return g if operand == "z" else g.abs_().add_(0.5)

    levels = []
    for size in case.shape.sizes:
        tensors = [normal(name, size) for name in case.op.inputs]
        if case.op.data == "counts":
            tensors = _counts(case, size, tensors, generator)
        elif case.op.data != "normal":
            top = 1 if case.op.data == "binary" else 255
            uniform = torch.special.ndtr(tensors[0].float())
            tensors[0] = ((uniform * top).round() / top).to(case.dtype)
        if case.shape.halves:
            pairs = zip(tensors[::2], tensors[1::2], strict=True)
            tensors = [torch.cat(pair, dim=1) for pair in pairs]
        for name, t in zip(case.op.inputs, tensors, strict=False):
            t.requires_grad_(name not in case.op.constants)
        grads = tuple(upstream(name, size) for name in case.op.outputs if name != "loss")
        levels.append(Level(tuple(tensors), grads))
    return tuple(levels)
