"""How an op is declared, and what follows from that for its public functions.

A public function of `fastvae` says what it takes: its signature, its documentation, and a body that
checks the arguments and returns a `Request`, the operands and settings of its kernel. `declare`
makes an op of it (`op.py`) and of its definition, a function of tensors, element by element.
`loss_of` makes of a log-probability the loss that ends in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from fastvae import backend

from .arguments import PARAMS, check_reduction, common_shape
from .op import OPS, Op, Request
from .remembered import Remembered

__all__ = ["declare", "definition_of", "loss_of"]

P = ParamSpec("P")
R = TypeVar("R")

_DEFINITIONS: dict[Callable[..., Any], Callable[..., Any]] = {}  # by public function


def declare(
    formula: Callable[..., R],
    *,
    eager: Callable[..., R] | None = None,
    params: Sequence[str] = PARAMS,
    whole: bool = False,
) -> Callable[[Callable[P, Request]], Callable[P, R]]:
    """Makes an op of a function that checks its arguments, and that has its kernel's name.

    Args:
        formula: the definition in plain PyTorch, element by element. It is given the operands by
            position, in the type that is computed in, with a packed Gaussian as two and `bound`
            applied, and what its keyword-only parameters name: `eps`, standard normals; `param`;
            other settings of the op; those that are none keep their default. It returns a sample, a
            value that is then summed over events, or both.
        eager: the same as fast as eager code goes, where the definition is slower than that; the
            precision is then that of float32, and what exceeds its range may be lost earlier. It
            returns sums, over the dimensions whose sizes its keyword-only parameter `event` is, and
            is given a scale that is a number as such. Autograd differentiates it, any number of
            times.
        params: the values of `param`, in the order of the kernels' codes.
        whole: the definition is of whole tensors as the kernel takes them, not of elements: nothing
            is broadcast or summed around it.
    """

    def decorate(request: Callable[P, Request]) -> Callable[P, R]:
        op = OPS[request.__name__] = Op(
            request.__name__, formula, eager or formula, request, params, whole
        )
        signature = inspect.signature(request)
        signature = signature.replace(
            return_annotation=inspect.signature(formula).return_annotation
        )

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return op.run(*request(*args, **kwargs))

        def define(*args: P.args, **kwargs: P.kwargs) -> R:
            return op.define(*request(*args, **kwargs))

        module, doc = request.__module__, request.__doc__
        again = Remembered(op.find_eager)
        return _publish(op.name, module, doc, signature, run, define, op.ordinary_call, again)

    return decorate


def loss_of(log_prob: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mean or sum over the batch of minus a log-probability: where it has a kernel, one op
    that makes the gradients in its only pass."""
    op = OPS.get(log_prob.__name__)
    name = log_prob.__name__.replace("log_prob", "nll_loss")
    signature = inspect.signature(log_prob)
    reduction = inspect.Parameter(
        "reduction", inspect.Parameter.KEYWORD_ONLY, default="mean", annotation="str"
    )
    signature = signature.replace(parameters=[*signature.parameters.values(), reduction])

    def run(*args: Any, reduction: str = "mean", **kwargs: Any) -> Tensor:
        check_reduction(reduction)
        if op is None:
            return _reduced(log_prob(*args, **kwargs), reduction)
        operands, settings = op.request(*args, **kwargs)
        total, reduction = _divisor(operands, settings, reduction)
        loss = op.run_loss(operands, settings, reduction)
        if loss is None:
            loss = _reduced(op.run(operands, settings), reduction)
        return loss if total is None else loss / total

    def define(*args: Any, reduction: str = "mean", **kwargs: Any) -> Tensor:
        check_reduction(reduction)
        if op is None:
            return _reduced(definition_of(log_prob)(*args, **kwargs), reduction)
        operands, settings = op.request(*args, **kwargs)
        total, reduction = _divisor(operands, settings, reduction)
        loss = _reduced(op.define(operands, settings), reduction)
        return loss if total is None else loss / total

    doc = _LOSS.format(log_prob=log_prob.__name__)
    ordinary, again = (op.ordinary_loss, Remembered(op.find_eager_loss)) if op else (None, None)
    return _publish(name, log_prob.__module__, doc, signature, run, define, ordinary, again)


def _reduced(log_prob: Tensor, reduction: str) -> Tensor:
    if reduction == "weighted_mean":
        raise ValueError(_NO_WEIGHT)
    return -(log_prob.mean() if reduction == "mean" else log_prob.sum())


def _divisor(
    operands: Sequence[Tensor | None], settings: dict[str, Any], reduction: str
) -> tuple[Tensor | int | None, str]:
    """What a loss is divided by after another reduction: the sum of the weights of all elements
    after "sum", or nothing."""
    if reduction != "weighted_mean":
        return None, reduction
    if "weight" not in settings:
        raise ValueError(_NO_WEIGHT)
    weight, elements = settings["weight"], common_shape(operands).numel()
    if weight is None:
        return elements, "sum"
    return weight.sum() * (elements / max(weight.numel(), 1)), "sum"


_NO_WEIGHT = "reduction is 'weighted_mean', which this op does not have; want 'mean' or 'sum'"

_LOSS = """The mean or sum over the batch of -`{log_prob}`, for a final loss.

    Where a gradient is wanted and there are kernels, it is made in the same pass: with a fixed
    scale, 12 bytes of float32 are moved for each element, against 20 by a forward and a backward
    pass. The loss may then be scaled, accumulated or added to others: backward multiplies the
    gradient by what comes from above, unless that is 1, and never waits for a device. float16 takes
    the two passes, since a gradient kept in float16 could underflow before a `GradScaler` enlarges
    it.

    Args:
        reduction: "mean" or "sum" over the values that `{log_prob}` would give, or "weighted_mean":
            their sum, divided by that of the weights of all elements; all else as there.

    Returns:
        Nats, 0-d; float32 for half types.

    Raises:
        ValueError: also for another `reduction`.
    """


def definition_of(public: Callable[P, R]) -> Callable[P, R]:
    """A public function's twin, which computes by the definition in plain PyTorch whatever kernels
    there are."""
    return _DEFINITIONS[public]


def _publish(
    name: str,
    module: str,
    doc: str | None,
    signature: inspect.Signature,
    run: Callable[..., R],
    define: Callable[..., R],
    ordinary: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None,
    again: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None,
) -> Callable[..., R]:
    """The public function that calls `run`, and its twin, `define`.

    Calls of `ordinary` tensors never come so far, if there is something that takes them. In all
    others subclasses and modes with `__torch_function__` have their say before anything else. Then
    come those that were seen before.
    """

    def public(*args: Any, **kwargs: Any) -> R:
        if ordinary is not None and backend.native_enabled() and not is_compiling():
            result = ordinary(args, kwargs)
            if result is not NotImplemented:
                return result
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            tensors = tuple(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            if has_torch_function(tensors):
                return handle_torch_function(public, tensors, *args, **kwargs)
        if again is not None and not is_compiling():
            result = again(args, kwargs)
            if result is not NotImplemented:
                return result
        return run(*args, **kwargs)

    annotations = {p.name: p.annotation for p in signature.parameters.values()}
    for function, text in ((public, doc), (define, f"See `fastvae.{name}`.")):
        function.__name__ = function.__qualname__ = name
        function.__module__ = module
        function.__doc__ = text
        function.__annotations__ = {**annotations, "return": signature.return_annotation}
        function.__signature__ = signature  # type: ignore[attr-defined]
    _DEFINITIONS[public] = define
    return public
