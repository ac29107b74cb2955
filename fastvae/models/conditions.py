"""What a model is conditioned on: a tensor [B, ...], or dictionaries, lists and tuples of such."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["each_tensor", "examples"]


def each_tensor(condition: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with each of its tensors replaced; what is no tensor stays."""
    if isinstance(condition, Tensor):
        return function(condition)
    if isinstance(condition, dict):
        return {name: each_tensor(part, function) for name, part in condition.items()}
    if isinstance(condition, list | tuple):
        parts = [each_tensor(part, function) for part in condition]
        named = hasattr(condition, "_fields")
        return type(condition)(*parts) if named else type(condition)(parts)
    return condition


def examples(condition: Any, batch_size: int) -> Iterator[Any]:
    """That of the first `batch_size` examples, of the next ones, without end."""
    for first in itertools.count(0, batch_size):
        part = slice(first, first + batch_size)
        yield each_tensor(condition, operator.itemgetter(part))
