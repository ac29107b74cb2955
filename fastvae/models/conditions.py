"""What a model is conditioned on: a tensor [B, ...], or dictionaries, lists and tuples of such.

A tensor of one row, or without dimensions, is shared by all examples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["batches", "each_tensor", "of_each_example"]


def each_tensor(
    condition: Any, function: Callable[[Tensor, str], Tensor], name: str = "condition"
) -> Any:
    """The same with each of its tensors replaced; what is no tensor stays.

    Args:
        function: of a tensor and of what it is called, such as "condition['label']".
    """
    if isinstance(condition, Tensor):
        return function(condition, name)
    if isinstance(condition, dict):
        return {
            key: each_tensor(part, function, f"{name}[{key!r}]") for key, part in condition.items()
        }
    if isinstance(condition, list | tuple):
        fields = getattr(condition, "_fields", None)  # of a named tuple
        names = (
            [f"{name}[{index}]" for index in range(len(condition))]
            if fields is None
            else [f"{name}.{field}" for field in fields]
        )
        parts = [
            each_tensor(part, function, called)
            for part, called in zip(condition, names, strict=True)
        ]
        return type(condition)(parts) if fields is None else type(condition)(*parts)
    return condition


def of_each_example(condition: Any, n: int, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with each tensor replaced that has a row for each of n examples.

    Raises:
        ValueError: a tensor has another number of rows, and not one for all; the message names it.
    """

    def replaced(t: Tensor, name: str) -> Tensor:
        if t.dim() and len(t) == n:
            return function(t)
        if t.dim() == 0 or len(t) == 1:
            return t
        raise ValueError(
            f"{name} has shape {list(t.shape)}; want [{n}, ...], a row for each example, or one "
            "row for all"
        )

    return each_tensor(condition, replaced)


def batches(x: Tensor, condition: Any, batch_size: int) -> Iterator[tuple[Tensor, Any]]:
    """The first `batch_size` examples with their condition, the next ones, and so on.

    Raises:
        ValueError: as `of_each_example`.
    """
    for first in range(0, len(x), batch_size):
        part = slice(first, first + batch_size)
        yield x[part], of_each_example(condition, len(x), operator.itemgetter(part))
