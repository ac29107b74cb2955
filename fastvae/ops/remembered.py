"""Calls of an eager formula that come again.

Between a public function and its formula stand the checks, and what reads settings, dtypes and
shapes: for tensors of 128 x 20 that took a quarter of the formula's own time. Where all else are
numbers and names, these and what the tensors are decide what the formula is given; so a call that
was seen before goes there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastvae import backend

from .graph import transformed

__all__ = ["FormulaCall", "Remembered"]

_PLAIN = (bool, int, float, str, type(None))
_MOST = 256  # of a function: more are of shapes and numbers that do not come again


class FormulaCall(NamedTuple):
    """What a formula is given beside tensors.

    Attributes:
        function: takes the first `tensors` arguments of a call, `others` and `values`.
        draws: it takes standard normals of the tensors' shape too, as `eps`.
        read: which of the tensors it takes in another form, and how that is made.
        divisor: of a loss, which is the sum of the values divided by that; else None.
    """

    function: Callable[..., Any]
    tensors: int
    others: tuple[float | None, ...]
    values: dict[str, Any]
    draws: bool
    read: tuple[int, Callable[[Tensor], Tensor]] | None = None
    divisor: float | None = None

    def __call__(self, args: tuple[Any, ...]) -> Any:
        values, tensors = self.values, args[: self.tensors]
        if self.draws:
            values = {**values, "eps": torch.randn_like(args[0])}
        if self.read is not None:
            k, read = self.read
            tensors = (*tensors[:k], read(tensors[k]), *tensors[k + 1 :])
        result = self.function(*tensors, *self.others, **values)
        return result if self.divisor is None else result / self.divisor


class Remembered:
    """Takes a public function's arguments; what it gives is NotImplemented unless an eager formula
    computes, and nothing but that is to be done.

    Args:
        find: checks the arguments and says what the formula is given, or None.
    """

    def __init__(self, find: Callable[..., FormulaCall | None]) -> None:
        self._find = find
        self._known: dict[Hashable, FormulaCall | None] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key: list[Any] = []
        count = 0
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is Parameter:
                if a.is_nested:
                    return NotImplemented
                key += (a.shape, a.dtype, a.device, a.layout)
                count += 1
            elif count and (kind is float or kind is int):
                key.append(a)
            else:
                return NotImplemented
        for name, value in kwargs.items():
            if type(value) not in _PLAIN or (name == "seed" and value is not None):
                return NotImplemented
            key += [name, value, type(value)]  # 1, 1.0 and True are equal
        if not count or backend.path(args[0]) != "eager" or transformed():
            return NotImplemented
        known = (*key,)
        if known not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[known] = self._find(*args, **kwargs)
        call = self._known[known]
        return NotImplemented if call is None else call(args)
