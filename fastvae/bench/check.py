"""Whether results are right, whoever computed them: what is wrong is not timed.

Every library draws its own noise, so eps is read off its z: it must look like standard normals,
and the gradients must be those of z = mu + sigma eps. All else is held to `fastvae.reference` in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import DiagonalGaussian, reference

from .cases import Case
from .inputs import Level

__all__ = ["WrongResult", "check"]

# Relative to an element and to the root mean square of its tensor, for code that rounds every
# intermediate result to the dtype.
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 0.02,
    torch.bfloat16: 0.1,
}
# The usual formulas of counts take differences of gamma functions, which torch.compile computes to
# fewer digits still. What fastvae makes is held to the definition in tests/test_counts.py.
_GAMMAS = 30
_ENOUGH = 2**20  # elements: where rows do not depend on each other, no more of them are checked


class WrongResult(Exception):
    """A result is not what the op is defined to give."""


def check(
    case: Case,
    level: Level,
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    definition: Callable[..., Any] | None = None,
) -> None:
    """Hold the outputs of one call, and the gradients of its leaves, to the definition.

    Args:
        definition: of a function of the leaves that stands for the op, but is not the same.

    Raises:
        WrongResult: with the name of the tensor and how far it is off.
    """
    rows, columns, *rest = level.leaves[0].shape
    size = (rows, columns // 2 if case.shape.halves else columns, *rest)
    for name, y in zip(case.op.outputs, outputs, strict=True):
        _check_shape(name, y, case.op.size(name, size))
    names = _names_of_gradients(case)
    if grads is not None:
        for name, g, leaf in zip(names, grads, level.wanted, strict=True):
            _check_shape(name, g, leaf.shape)

    # Of few rows: all but those in the middle, if no row's results depend on others.
    alone = (
        not case.op.samples
        and case.op.outputs != ("loss",)
        and len({t.shape for t in level.leaves}) == 1
    )
    kept = max(1, _ENOUGH // (2 * math.prod(size[1:]))) if alone else rows

    def some(t: Tensor) -> Tensor:
        return t if 2 * kept >= rows else torch.cat([t[:kept], t[-kept:]])

    exact = [some(t.detach()).double().requires_grad_(t.requires_grad) for t in level.leaves]
    tensors = [h for t in exact for h in t.chunk(2, 1)] if case.shape.halves else exact
    if definition is not None:
        value = definition(*tensors)
        right = [*value] if isinstance(value, tuple) else [value]
    else:
        right = _definition(case, tensors, [some(y) for y in outputs])
    tolerance = _TOLERANCE[case.dtype]
    if case.op.data == "counts":
        tolerance *= _GAMMAS
    for name, y, value in zip(case.op.outputs, outputs, right, strict=True):
        _compare(name, some(y), value.detach(), tolerance)
    if grads is not None:
        wanted = [t for t in exact if t.requires_grad]
        upstream = [some(g).double() for g in level.upstream]
        right_grads = torch.autograd.grad(right, wanted, upstream or None)
        for name, g, value in zip(names, grads, right_grads, strict=True):
            _compare(name, some(g) if alone else g, value, tolerance)


def _names_of_gradients(case: Case) -> list[str]:
    names = [name for name in case.op.inputs if name not in case.op.constants]
    if case.shape.halves:
        names = [", ".join(pair) for pair in zip(names[::2], names[1::2], strict=True)]
    return [f"the gradient of {name}" for name in names]


def _definition(case: Case, tensors: list[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The op's outputs in float64, with the noise that is in its z."""
    function, options = case.op.function, case.op.options
    if function.endswith(("_log_prob", "_nll_loss")):
        given = dict(zip(case.op.inputs, tensors, strict=True))
        weight = {"weight": given.pop("weight")} if "weight" in given else {}
        found = getattr(reference, function)(*given.values(), **weight, **options)
        return [*found] if isinstance(found, tuple) else [found]
    if function == "straight_through_categorical":
        mix = options["uniform_mix"]
        p = (1 - mix) * torch.softmax(tensors[0], -1)
        z = outputs[0].round().double().detach()
        _check_one_hot(z, p.detach() + mix / p.shape[-1])
        return [z + p - p.detach()]
    right = []
    if function.startswith("rsample"):
        mu, sigma = tensors[0], DiagonalGaussian(*tensors[:2], **options).stddev
        eps = ((outputs[0].double() - mu) / sigma).detach()
        _check_normal(eps, _TOLERANCE[case.dtype])
        right.append(mu + sigma * eps)
    if function == "rsample_log_ratio":
        z, dims = right[0], tensors[0].dim() - 1
        log_p = reference.gaussian_log_prob(z, 0.0, event_ndim=dims)
        right.append(log_p - reference.gaussian_log_prob(z, *tensors, event_ndim=dims))
    if "kl" in function:
        kl = getattr(reference, function.replace("rsample_kl", "kl_divergence"))
        right.append(kl(*tensors, **options))
    return right


def _check_one_hot(z: Tensor, p: Tensor) -> None:
    """One class of each group, and each class as often as is likely: it is off by more, of a right
    sampler, twice in e^18 (Bernstein's inequality, which holds for rare classes too)."""
    if not ((z == 0) | (z == 1)).all() or not (z.sum(-1) == 1).all():
        raise WrongResult("z is not one-hot")
    groups = tuple(range(z.dim() - 1))
    error, variance = (z - p).sum(groups).abs(), (p * (1 - p)).sum(groups)
    if not (error <= 6 + (36 + 36 * variance).sqrt()).all():
        raise WrongResult(f"z has a class {error.max():.3g} times too often or too seldom")


def _check_normal(eps: Tensor, tolerance: float) -> None:
    """Mean and variance, within six standard errors."""
    n = eps.numel()
    mean, variance = eps.mean().item(), eps.square().mean().item()
    if not abs(mean) <= 6 / math.sqrt(n) + tolerance:
        raise WrongResult(f"z holds noise of mean {mean:.3g}; want 0")
    if not abs(variance - 1) <= 6 * math.sqrt(2 / n) + tolerance:
        raise WrongResult(f"z holds noise of variance {variance:.3g}; want 1")


def _check_shape(name: str, result: Tensor, size: Sequence[int]) -> None:
    if tuple(result.shape) != tuple(size):
        raise WrongResult(f"{name} has shape {list(result.shape)}; want {list(size)}")


def _compare(name: str, result: Tensor, value: Tensor, tolerance: float) -> None:
    error = (result.double() - value).abs()
    allowed = tolerance * (value.abs() + value.square().mean().sqrt())
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        index = int(wrong.flatten().nonzero()[0])
        got, want = result.flatten()[index].item(), value.flatten()[index].item()
        raise WrongResult(
            f"{name} is {got:.6g} at {index}, and {int(wrong.sum())} are wrong; want {want:.6g}"
        )
