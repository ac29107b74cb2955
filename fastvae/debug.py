"""Finding out where a run was poisoned: non-finite numbers, counted on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NonFinite", "NonFiniteCount"]


class NonFiniteCount(NamedTuple):
    """How many NaN and infinite elements an op was given, and how many it returned."""

    inputs: int
    outputs: int


class NonFinite(TorchDispatchMode):
    """Counts the NaN and infinite elements that the fused ops are given and return.

    The counts stay on the device until they are asked for, so that no step waits. Each op is
    counted by its name, backward passes such as "rsample_kl_backward" by their own. An op whose
    outputs have more of them than its inputs is where a run went wrong. For eager code on the
    native path; the cost is one pass over each input and output.

    Example:
        >>> with fastvae.NonFinite() as found:
        ...     model(x).loss.backward()
        >>> found.counts()
        {'rsample_kl': NonFiniteCount(inputs=0, outputs=0), ...}
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[tuple[str, torch.device], Tensor] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fastvae":
            outputs = result if isinstance(result, tuple | list) else (result,)
            device = next(t.device for t in args if isinstance(t, Tensor))
            counts = torch.stack([_count(args, device), _count(outputs, device)])
            key = func.overloadpacket.__name__, device
            self._counts[key] = self._counts[key] + counts if key in self._counts else counts
        return result

    def counts(self) -> dict[str, NonFiniteCount]:
        """The counts so far, of every op that was called. This waits for the device."""
        found: dict[str, NonFiniteCount] = {}
        for (name, _), counts in self._counts.items():
            before = found.get(name, (0, 0))
            inputs, outputs = counts.tolist()
            found[name] = NonFiniteCount(before[0] + inputs, before[1] + outputs)
        return found


def _count(values: Sequence[Any], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=device)
    for t in values:
        if isinstance(t, Tensor) and t.is_floating_point():
            total = total + (~t.isfinite()).sum()
    return total
