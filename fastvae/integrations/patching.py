"""What every patch of another package can do: be undone, and say what it served."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributions import kl, register_kl

from ..ops import has_kernels

__all__ = ["Patch", "eager_dtype", "serves", "serves_alike", "shared"]


class Patch:
    """Methods of another package's classes, replaced until `undo`, or until the end of a `with`.

    The classes are changed, not the names that they are imported by, so that imports before the
    patch follow it. A replacement returns NotImplemented for what it does not serve; the original
    is called then. Patches may be undone in any order: one that another has been put upon stays in
    its place and only calls the original. Calls that `torch.compile` traces are not counted.

    Attributes:
        served, passed_on: how often each method was computed by fastvae, and how often not.
    """

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        self.passed_on: Counter[str] = Counter()
        self._on = True
        self._undo: list[Callable[[], object]] = []

    def replace(self, owner: type, name: str, replacement: Callable[..., Any]) -> None:
        """Puts `replacement`, which is given the same arguments, in a method's place."""
        own = name in vars(owner)
        original = getattr(owner, name)
        method = self._instead_of(original, replacement, f"{owner.__name__}.{name}")

        def put_back() -> None:
            if vars(owner).get(name) is method:
                setattr(owner, name, original) if own else delattr(owner, name)

        setattr(owner, name, method)
        self.on_undo(put_back)

    def replace_kl(self, p: type, q: type, replacement: Callable[..., Any]) -> None:
        """The same for what `torch.distributions.kl_divergence` calls for two classes."""
        original = kl._KL_REGISTRY[p, q]
        label = f"kl_divergence({p.__name__}, {q.__name__})"
        function = self._instead_of(original, replacement, label)

        def put_back() -> None:
            if kl._KL_REGISTRY[p, q] is function:
                register_kl(p, q)(original)

        register_kl(p, q)(function)
        self.on_undo(put_back)

    def replace_function(self, function: FunctionType, replacement: Callable[..., Any]) -> None:
        """The same for a module's function. It is changed itself, as a class is: whoever has
        imported it by name calls the replacement too."""
        before = function.__code__, function.__defaults__, function.__kwdefaults__
        original = FunctionType(
            before[0], function.__globals__, function.__name__, before[1], function.__closure__
        )
        original.__kwdefaults__ = before[2]
        put_in = {"_call": self._instead_of(original, replacement, function.__name__)}

        def code(*args: Any, _call: Callable[..., Any], **kwargs: Any) -> Any:
            return _call(*args, **kwargs)

        def put_back() -> None:
            if function.__kwdefaults__ is put_in:
                function.__code__, function.__defaults__, function.__kwdefaults__ = before

        function.__code__, function.__defaults__ = code.__code__, None
        function.__kwdefaults__ = put_in
        self.on_undo(put_back)

    def _instead_of(
        self, original: Callable[..., Any], replacement: Callable[..., Any], label: str
    ) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return original(*args, **kwargs)
            result = replacement(*args, **kwargs)
            if result is NotImplemented:
                self.passed_on[label] += 1
                return original(*args, **kwargs)
            self.served[label] += 1
            return result

        # torch.compile follows functions, but not what belongs to an object that it cannot see.
        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            if not is_compiling():
                return counted(*args, **kwargs)
            result = replacement(*args, **kwargs)
            return original(*args, **kwargs) if result is NotImplemented else result

        return function

    def on_undo(self, action: Callable[[], object]) -> None:
        self._undo.append(action)

    def undo(self) -> None:
        """Puts everything back. A second call does nothing."""
        self._on = False
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        names = sorted({*self.served, *self.passed_on})
        lines = [
            f"{name:40s} served {self.served[name]}, passed on {self.passed_on[name]}"
            for name in names
        ]
        return "\n".join(lines) or "nothing was called"


def serves(first: Any, *others: Any) -> bool:
    """Whether there are kernels for all of these: floating-point tensors of one device, of which
    no graph of TorchScript is made."""
    if not (isinstance(first, Tensor) and first.is_floating_point() and has_kernels(first)):
        return False
    for t in others:  # a loop, because this is a tenth of a small call
        if not (isinstance(t, Tensor) and t.is_floating_point() and t.device == first.device):
            return False
    return torch._C._get_tracing_state() is None


def serves_alike(first: Any, *others: Any) -> bool:
    """Whether they are served, with results of the dtype that PyTorch gives them."""
    if not serves(first, *others):
        return False
    dtype = first.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:  # half types would become float32
        return False
    for t in others:  # noqa: SIM110  a small call's time
        if t.dtype is not dtype:
            return False
    return True


def shared(t: Tensor) -> Tensor:
    """The tensor that `t` was expanded from, if it was: its gradient is summed in the kernel."""
    base = t._base
    if base is None or 0 not in t.stride() or base.data_ptr() != t.data_ptr():
        return t
    if base.requires_grad and t.grad_fn is None:  # expanded without gradient
        return t
    new = t.dim() - base.dim()
    if new < 0 or base.dtype != t.dtype or any(t.stride()[:new]):
        return t
    of_each = zip(base.shape, base.stride(), t.shape[new:], t.stride()[new:], strict=True)
    for size, stride, wide, found in of_each:
        if (size, stride) != (wide, found) and (size, found) != (1, 0):
            return t
    return base


def eager_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a sum of elementwise functions of these, as PyTorch's own ops make it."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    if tensors[0].is_cuda and dtype.itemsize == 2 and torch.is_autocast_enabled("cuda"):
        return torch.float32  # autocast's sum, exp and pow
    return dtype
