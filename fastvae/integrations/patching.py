"""What every patch of another package can do: be undone, and say what it served."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor

from ..ops import has_kernels

__all__ = ["Patch", "eager_dtype", "serves"]


class Patch:
    """Methods of another package's classes, replaced until `undo`, or until the end of a `with`.

    The classes are changed, not the names that they are imported by, so that imports before the
    patch follow it. A replacement returns NotImplemented for what it does not serve; the original
    is called then.

    Attributes:
        served, passed_on: how often each method was computed by fastvae, and how often not.
    """

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        self.passed_on: Counter[str] = Counter()
        self._undo: list[Callable[[], object]] = []

    def replace(self, owner: type, name: str, replacement: Callable[..., Any]) -> None:
        """Puts `replacement`, which is given the same arguments, in a method's place."""
        own = name in vars(owner)
        original = getattr(owner, name)
        method = self._stand_in(f"{owner.__name__}.{name}", replacement, original)

        def put_back() -> None:
            if vars(owner).get(name) is not method:  # another patch stands on this one
                return
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        setattr(owner, name, method)
        self.on_undo(put_back)

    def replace_function(self, function: FunctionType, replacement: Callable[..., Any]) -> None:
        """Puts `replacement` in the place of a module's function. The function itself is changed,
        as a class is: whoever has imported it by name calls the replacement too."""
        before = function.__code__, function.__defaults__, function.__kwdefaults__
        original = FunctionType(
            before[0], function.__globals__, function.__name__, before[1], function.__closure__
        )
        original.__kwdefaults__ = before[2]
        put_in = {"_call": self._stand_in(function.__name__, replacement, original)}

        def code(*args: Any, _call: Callable[..., Any], **kwargs: Any) -> Any:
            return _call(*args, **kwargs)

        def put_back() -> None:
            if function.__kwdefaults__ is put_in:
                function.__code__, function.__defaults__, function.__kwdefaults__ = before

        function.__code__, function.__defaults__ = code.__code__, None
        function.__kwdefaults__ = put_in
        self.on_undo(put_back)

    def _stand_in(
        self, label: str, replacement: Callable[..., Any], original: Callable[..., Any]
    ) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            return self.call(label, replacement, original, *args, **kwargs)

        @functools.wraps(original)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # what is compiled is not counted
                result = replacement(*args, **kwargs)
                return original(*args, **kwargs) if result is NotImplemented else result
            return counted(*args, **kwargs)

        return stand_in

    def call(
        self,
        label: str,
        replacement: Callable[..., Any],
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not self._undo:  # undone, while another patch stood on this one
            return original(*args, **kwargs)
        result = replacement(*args, **kwargs)
        if result is NotImplemented:
            self.passed_on[label] += 1
            return original(*args, **kwargs)
        self.served[label] += 1
        return result

    def on_undo(self, action: Callable[[], object]) -> None:
        self._undo.append(action)

    def undo(self) -> None:
        """Puts everything back. A second call does nothing."""
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


def serves(*tensors: Any) -> bool:
    """Whether there are kernels for all of these: floating-point tensors of one device."""
    first = tensors[0]
    return (
        isinstance(first, Tensor)
        and all(
            isinstance(t, Tensor) and t.device == first.device and t.is_floating_point()
            for t in tensors
        )
        and has_kernels(first)
    )


def eager_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a sum of elementwise functions of these, as PyTorch's own ops make it."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    if tensors[0].is_cuda and dtype.itemsize == 2 and torch.is_autocast_enabled("cuda"):
        return torch.float32  # autocast's sum, exp and pow
    return dtype
