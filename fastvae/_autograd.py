"""What the fused ops' `torch.autograd.Function`s have in common.

Each saves its inputs and the seed, nothing else; noise is drawn again in backward. Each has its
reference formula too, which takes over where PyTorch wants to look inside: in a backward pass that
is itself being recorded (`create_graph=True`), under `torch.func` (vmap, grad, jvp, ...) and under
forward-mode differentiation.

`forward` takes `ctx`, the older form: with `setup_context` every call would pay 13 us for
`inspect.signature`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import (
    _fake,  # noqa: F401  tells the compiler what the ops return
    backend,  # noqa: F401  loads the binary, which defines the ops
)

__all__ = [
    "Function",
    "Gradients",
    "apply",
    "bits",
    "find_op",
    "log_prob_backward",
    "recorded",
    "recording",
    "transformed",
]

Gradients = tuple[Tensor | None, ...]


def find_op(name: str) -> Any:
    """An op of the binary, looked up once: every call would pay for it. None without a binary."""
    return getattr(getattr(torch.ops.fastvae, name, None), "default", None)


class Function(torch.autograd.Function):
    """An op of `torch.ops.fastvae`: `forward` and `formula` take the op's own arguments."""

    op: Any

    @staticmethod
    def formula(*arguments: Any) -> Any:
        """The op in plain PyTorch."""
        raise NotImplementedError


def apply(function: type[Function], *arguments: Any) -> Any:
    """Calls the op, and records it only if somebody can ask for a gradient."""
    if transformed():
        return function.formula(*arguments)
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return function.apply(*arguments)
    if torch.compiler.is_compiling():  # the compiler reads no attribute of a Function
        return function.apply(*arguments)
    return function.op(*arguments)


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def log_prob_backward(
    ctx: Any, op: Any, formula: Callable[..., Tensor], grad_log_prob: Tensor
) -> Gradients:
    """The gradients of a log-probability's tensors, which `ctx` saved with its `settings`.

    Args:
        op: takes the upstream gradient, the tensors, the settings, and whose gradients are wanted.
        formula: of the tensors and the settings.
    """
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[: len(tensors)]
    if recording():
        return recorded(formula, tensors, ctx.settings, needs, (grad_log_prob,))
    return op(grad_log_prob, *tensors, *ctx.settings, bits(needs))


def bits(needs: Sequence[bool]) -> int:
    bits = 0
    for i, need in enumerate(needs):
        bits |= need << i
    return bits


def recording() -> bool:
    """Whether this backward pass will be differentiated, or is transformed."""
    return torch.is_grad_enabled() or transformed()


def recorded(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    others: Sequence[Any],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> Gradients:
    """Gradients of `inputs` by autograd through `formula`, recorded to be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # off while `vmap` goes over several upstream gradients
        # Views of their own: one tensor given twice must not get the sum of both gradients twice.
        leaves = [None if t is None else t.view_as(t) for t in inputs]
        outputs = formula(*leaves, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs],
            [leaf for leaf in wanted if leaf is not None],
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return tuple(next(found) if need else None for need in needs)
