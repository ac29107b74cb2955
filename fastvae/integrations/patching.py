"""What every patch of another package can do: be undone, and say what it served."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor

from ..ops import has_kernels

__all__ = ["Patch", "serves"]


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
        label = f"{owner.__name__}.{name}"

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return self.call(label, replacement, original, *args, **kwargs)

        setattr(owner, name, method)
        self.on_undo(lambda: setattr(owner, name, original) if own else delattr(owner, name))

    def call(
        self,
        label: str,
        replacement: Callable[..., Any],
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
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
