"""The program under audit, and its runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .trace import Recorder, Replacement, UnsteadyError

__all__ = ["Program", "Run"]

Loss = Callable[[nn.Module, Any], Any]


@dataclasses.dataclass
class Run:
    """A loss, and how it came about."""

    loss: Tensor
    trace: Recorder


class Program:
    """A model and how its loss is made of a batch, in training mode.

    Runs are of a copy of the model, in float64 where the program allows that: its own tensors and
    what it asks for in float32 are then float64, and numbers are compared exactly.

    Attributes:
        exact: whether runs are in float64.
        batch: the number of examples.
    """

    def __init__(self, model: nn.Module, x: Any, loss: Loss | None, examples: int = 7) -> None:
        self._loss = loss
        self.own_model, self.own_x = _copy(model).train(), x
        self.model, self.x, self.exact = self.own_model, x, False
        self._noise: list[Tensor] | None = None
        sizes = {t.shape[0] for t in tree_leaves(x) if isinstance(t, Tensor) and t.dim()}
        self.batch = sizes.pop() if len(sizes) == 1 else 0
        if self.batch < 2:
            raise ValueError(
                f"x has {self.batch} examples along the first dimension of its tensors; want at "
                "least 2, the same number in each"
            )
        wide = _copy(self.own_model).double()
        candidates = [(wide, _doubled(x), True), (self.own_model, x, False)]
        failure: Exception | None = None
        for some in (min(self.batch, examples), self.batch):
            for self.model, whole, self.exact in candidates:
                self.x = tree_map(lambda t: _first(t, some), whole)  # noqa: B023
                try:
                    self.run()
                except UnsteadyError:
                    raise
                except Exception as error:  # whatever the user's program raises
                    failure = failure or error
                else:
                    self.batch = some
                    return
        assert failure is not None
        try:  # as the user would run it: the error to show is that one
            self.model, self.x, self.exact = self.own_model, x, False
            self.run()
        except Exception as error:
            raise error from None
        raise failure

    def run(
        self,
        *,
        seed: int = 0,
        noise: list[Tensor] | None = None,
        replace: dict[tuple[int, int], Replacement] | None = None,
    ) -> Run:
        """One run with gradients.

        Args:
            seed: of all generators. The model's own ones go on as they will.
            noise: of all draws; drawn by default.
            replace: what takes the place of results, by their keys.
        """
        given = [t for t in tree_leaves(self.x) if isinstance(t, Tensor)]
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        trace = Recorder(given, noise=noise, replace=replace, double=self.exact)
        try:
            with _seeded(seed, given), _default(self.exact), torch.enable_grad(), _eager(), trace:
                result = (
                    self.model(self.x) if self._loss is None else self._loss(self.model, self.x)
                )
                loss = _loss_of(result)
        finally:
            for buffer, before in buffers:  # .data: the graph may hold them
                if buffer.shape == before.shape:
                    buffer.data.copy_(before)
        return Run(loss, trace)

    def smaller(self) -> Program | None:
        """The same with fewer examples; None where there are too few, or that fails."""
        other = copy.copy(self)
        other.batch = self.batch - 2
        if other.batch < 2:
            return None
        other.x = tree_map(lambda t: _first(t, other.batch), self.x)
        try:
            other.run()
        except Exception:  # whatever the user's program raises
            return None
        return other

    def jitter(self) -> None:
        """Moves all weights a little, so that nothing is zero because it starts there."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for p in self.model.parameters():
                if p.is_floating_point():
                    size = p.square().mean().sqrt() if p.numel() else 0.0
                    p.add_(torch.randn_like(p) * (0.05 * size + 0.02))


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise TypeError(
            f"model is a {type(model).__name__} that cannot be copied: {error}"
        ) from error


def _doubled(x: Any) -> Any:
    return tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, x
    )


def _first(t: Any, n: int) -> Any:
    return t[:n] if isinstance(t, Tensor) and t.dim() else t


def _loss_of(result: Any) -> Tensor:
    if isinstance(result, Mapping):
        found = result.get("loss")
    elif hasattr(result, "loss"):
        found = result.loss
    elif isinstance(result, tuple | list) and result:
        found = result[0]
    else:
        found = result
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(
            f"the model returned a {type(result).__name__}, with no loss in it; want a 0-d tensor, "
            "a tuple that begins with one, or something with a loss under that name; or give "
            "loss=, a function of model and x"
        )
    if found.dim() > 1:
        raise TypeError(
            f"the loss has shape {list(found.shape)}; want [], or one value for each example; or "
            "give loss=, a function of model and x"
        )
    return found.mean() if found.dim() else found


@contextlib.contextmanager
def _seeded(seed: int, given: list[Tensor]) -> Iterator[None]:
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = {t.device for t in given if t.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002


@contextlib.contextmanager
def _default(double: bool) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Compiled modules as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
