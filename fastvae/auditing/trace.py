"""A run of a model, recorded: every PyTorch function that it calls, what flows into what, and the
line of the program that called it.

A run can be repeated with some of its tensors replaced, which is how it is asked questions. The
random numbers of a repeated run are the first one's, unless they are replaced.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fastvae

from ..ops.arguments import check_reduction
from ..ops.noise import normals_of
from ..ops.op import OPS, Op

__all__ = ["Draw", "Line", "Recorder", "Value"]

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(fastvae.__file__).parent))

# Reductions are recorded as what they are: values of elements, and then their sum or mean.
_LOSSES = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.gaussian_nll_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.nll_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the user's program."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.number}"


@dataclasses.dataclass(eq=False)
class Value:
    """A tensor of a run, and where it came from.

    Attributes:
        index: in the order of appearance, by which runs are compared.
        key: the number of the call and the place among its results; None for what the model was
            given, its parameters and buffers.
        ancestors: the indices of all that it was computed from, itself included, as bits.
        stale: written over since.
    """

    index: int
    tensor: Tensor
    name: str
    line: Line | None
    key: tuple[int, int] | None = None
    ancestors: int = 0
    inputs: tuple[int, ...] = ()
    stale: bool = False

    def of(self, indices: int) -> bool:
        """Whether it was computed from any of these, which are bits."""
        return bool(self.ancestors & indices)


@dataclasses.dataclass(eq=False)
class Draw:
    """Random numbers: `mean + std * noise` if they are normal, the noise itself otherwise.

    Attributes:
        value: the index of the tensor that holds them.
        parametric: mean or std are tensors, so that no gradient passes.
    """

    value: int
    noise: Tensor
    normal: bool
    line: Line | None
    std: float | Tensor = 1.0
    mean: float | Tensor = 0.0
    parametric: bool = False


Replacement = Callable[[Tensor], Tensor]


class Recorder(TorchFunctionMode):
    """Records what runs inside of it.

    Args:
        given: what the model is given.
        noise: that of the draws, in their order.
        replace: by `Value.key`, what takes the place of a result.
        double: keep all in float64.
    """

    def __init__(
        self,
        given: Iterable[Tensor],
        *,
        noise: list[Tensor] | None = None,
        replace: dict[tuple[int, int], Replacement] | None = None,
        double: bool = False,
    ) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.draws: list[Draw] = []
        self._noise, self._replace, self._double = noise, replace or {}, double
        self._calls = 0
        self._by_id: dict[int, Value] = {}
        self._by_place: dict[tuple[int, int, torch.Size], Value] = {}
        self.given = 0
        for t in given:
            self.given |= 1 << self._source(t).index

    # ---- Calls -----------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if self._double:
            if name in ("float", "half", "bfloat16"):
                func = torch.Tensor.double
            args = tuple(_widened(a) for a in args)
            kwargs = {k: _widened(a) for k, a in kwargs.items()}
        if getattr(func, "__module__", "") in _OPS_MODULES:
            with self:
                return self._opened(func, name, args, kwargs)
        if func in _LOSSES:
            elements = self._elements(func, args, kwargs)
            if elements is not None:
                with self:
                    return elements()
        if name in _DRAWS:
            drawn = self._draw(func, name, args, kwargs)
            if drawn is not None:
                return drawn
        before = args[0] if args and (name.endswith("_") or name == "__setitem__") else None
        result = func(*args, **kwargs)
        if name == "__setitem__":
            self._record(name, (args, kwargs), before, before)
            return result
        return self._record(name, (args, kwargs), result, before)

    def _record(self, name: str, arguments: Any, result: Any, written: Any = None) -> Any:
        """Keeps the tensors of a result, and returns it, with what takes their place."""
        if isinstance(result, Tensor):
            several = False
            tensors = [result]
        elif isinstance(result, tuple | list) and any(isinstance(t, Tensor) for t in result):
            several = True
            tensors = [t for t in result if isinstance(t, Tensor)]
        else:
            return result
        inputs = [self._value(t) for t in _tensors(arguments)]
        indices, ancestors = tuple({v.index: None for v in inputs}), 0
        for value in inputs:
            ancestors |= value.ancestors
        line = _line()
        call, self._calls = self._calls, self._calls + 1
        for k, t in enumerate(tensors):
            replaced = t
            replacement = self._replace.get((call, k))
            if replacement is not None:
                with torch.enable_grad():
                    replaced = replacement(t.detach().clone())
                    if t is written:  # whoever holds it must see it too
                        replaced = t.detach_() if t.is_leaf or not t._is_view() else t
                        replaced.copy_(replacement(t.detach().clone()))
                tensors[k] = replaced
            if t is written and (old := self._by_id.get(id(t))) is not None:
                old.stale = True
            self._keep(Value(len(self.values), replaced, name, line, (call, k), ancestors, indices))
        if not several:
            return tensors[0]
        kept = iter(tensors)
        changed = [next(kept) if isinstance(t, Tensor) else t for t in result]
        if hasattr(result, "_fields"):
            return type(result)(*changed)
        try:
            return type(result)(changed)
        except TypeError:  # a structseq of torch
            return result

    # ---- What flows ------------------------------------------------------------------------------

    def _keep(self, value: Value) -> Value:
        value.ancestors |= 1 << value.index
        self.values.append(value)
        self._by_id[id(value.tensor)] = value
        self._by_place[_place(value.tensor)] = value
        return value

    def _source(self, t: Tensor) -> Value:
        return self._keep(Value(len(self.values), t, "given", None))

    def _value(self, t: Tensor) -> Value:
        found = self._by_id.get(id(t))
        if found is not None:
            return found
        # Another tensor of the same memory: `Variable(t)`, `t.data` of a Parameter.
        found = self._by_place.get(_place(t)) if t.numel() else None
        return found if found is not None else self._source(t)

    def find(self, t: Tensor) -> Value | None:
        return self._by_id.get(id(t))

    def descendants(self, indices: int) -> Iterator[Value]:
        return (v for v in self.values if v.of(indices))

    # ---- Noise -----------------------------------------------------------------------------------

    def _draw(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor | None:
        normal = "rand" not in name.replace("randn", "") and name != "uniform_"
        mean: Any = 0.0
        std: Any = 1.0
        if name in ("normal_", "normal"):
            first = name == "normal_"
            mean = kwargs.get("mean", args[first] if len(args) > first else 0.0)
            std = kwargs.get("std", args[first + 1] if len(args) > first + 1 else 1.0)
        sampled = func(*args, **kwargs)
        if not sampled.is_floating_point():
            return None
        k = len(self.draws)
        with torch.no_grad():
            if self._noise is not None:
                if k >= len(self._noise) or self._noise[k].shape != sampled.shape:
                    raise UnsteadyError("it draws other numbers of samples in every run")
                noise = self._noise[k]
            else:
                noise = (sampled.detach() - mean) / std if normal else sampled.detach()
                noise = noise.clone()
            drawn = (mean + std * noise if normal else noise).to(sampled.dtype)
        written = args[0] if name.endswith("_") else None
        if written is not None:
            with torch.no_grad():
                written.copy_(drawn)
            drawn = written
        else:
            drawn = drawn.detach().clone()
        result = self._record(name, (args, kwargs), drawn, written)
        parametric = isinstance(mean, Tensor) or isinstance(std, Tensor)
        if parametric and not (_varies(mean) or _varies(std)):
            mean, std, parametric = float(_first(mean)), float(_first(std)), False
        kept = self._by_id[id(result)]
        self.draws.append(Draw(kept.index, noise, normal, kept.line, std, mean, parametric))
        return result

    # ---- What is opened --------------------------------------------------------------------------

    def _elements(self, func: Any, args: Any, kwargs: Any) -> Callable[[], Tensor] | None:
        reduction = kwargs.get("reduction", "mean")
        if reduction == "none" or kwargs.get("reduce") is not None:
            return None
        if kwargs.get("size_average") is not None:
            reduction = "mean" if kwargs["size_average"] else "sum"
        rest = {k: v for k, v in kwargs.items() if k not in ("size_average", "reduction")}
        try:
            with torch.no_grad():
                whole = func(*args, **kwargs)
                none = func(*args, **rest, reduction="none")
                again = none.mean() if reduction == "mean" else none.sum()
            if not torch.allclose(whole, again, rtol=1e-4, equal_nan=True):
                return None
        except (TypeError, ValueError, RuntimeError):
            return None

        def elements() -> Tensor:
            each = func(*args, **rest, reduction="none")
            return each.mean() if reduction == "mean" else each.sum()

        return elements

    def _opened(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A function of fastvae, by its definition."""
        if name.endswith("_nll_loss"):
            reduction = kwargs.pop("reduction", "mean")
            check_reduction(reduction)
            each = getattr(fastvae, name.replace("nll_loss", "log_prob"))(*args, **kwargs)
            return -(each.mean() if reduction == "mean" else each.sum())
        op: Op[Any] | None = OPS.get(name)
        if op is None:
            return func(*args, **kwargs)
        return op.define_with(self._normals, *op.request(*args, **kwargs))

    def _normals(self, source: Any, shape: Any, sample_shape: Any, like: Tensor) -> Tensor:
        if not isinstance(source, Tensor):
            size = (*sample_shape, *shape)  # the call below comes here to be recorded
            return torch.randn(size, generator=source, dtype=like.dtype, device=like.device)
        with torch._C.DisableTorchFunction():
            k = len(self.draws)
            drawn = normals_of(source, shape, sample_shape, like)
            noise = drawn if self._noise is None else self._noise[k].clone()
        kept = self._keep(Value(len(self.values), noise, "seed", _line()))
        self.draws.append(Draw(kept.index, noise.clone(), True, kept.line))
        return noise


class UnsteadyError(RuntimeError):
    """Two runs under one seed differ in what they do."""


_DRAWS = {"randn", "randn_like", "normal_", "normal", "rand", "rand_like", "uniform_"}
_OPS_MODULES = {op.request.__module__ for op in OPS.values()}


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, tuple | list):
        for a in arguments:
            yield from _tensors(a)
    elif isinstance(arguments, dict):
        for a in arguments.values():
            yield from _tensors(a)


def _place(t: Tensor) -> tuple[int, int, torch.Size]:
    try:
        return t.data_ptr(), t.dim(), t.shape
    except RuntimeError:  # no memory of its own
        return id(t), -1, t.shape


def _line() -> Line | None:
    """The innermost line that is neither PyTorch's nor this package's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARIES) and not file.startswith("<"):
            return Line(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _widened(a: Any) -> Any:
    return torch.float64 if isinstance(a, torch.dtype) and a in _FLOATS else a


def _varies(a: Any) -> bool:
    return isinstance(a, Tensor) and a.numel() > 1 and bool((a != a.flatten()[0]).any())


def _first(a: Any) -> Any:
    return a.detach().flatten()[0].item() if isinstance(a, Tensor) else a
