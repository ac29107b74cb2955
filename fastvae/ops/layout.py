"""The ops of `torch.ops.fastvae` without data: the shapes, strides and dtypes that they return.

`torch.compile`, `torch.export` and meta tensors ask for them. What `Layout` says is what
`csrc/ops/call.cpp` allocates; `torch.library.opcheck` holds the two together in the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import backend  # noqa: F401  loads the binary, which defines the ops

__all__ = ["Layout", "Schema", "schemas"]


def _of_values(t: Tensor) -> torch.dtype:
    """Of sums of values that operands like this one have."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class Layout:
    """The common shape of an op's inputs, and the order in memory that its outputs take from them.

    Args:
        inputs: one or two tensors a Gaussian; None stands for what is not given.
        packed: the positions in `inputs` of tensors that hold a whole Gaussian.
        packed_dim: where its halves lie.
        event_ndim: how many trailing dimensions are summed; None where the op sums nothing.
        sample_shape: dimensions in front.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor | None],
        *,
        packed: Sequence[int] = (),
        packed_dim: int = -1,
        event_ndim: int | None = None,
        sample_shape: Sequence[int] = (),
    ) -> None:
        self.inputs, self.packed_dim = inputs, packed_dim
        self.event_ndim = event_ndim or 0
        assert inputs[0] is not None
        self.first: Tensor = inputs[0]
        sizes = []
        for k, t in enumerate(inputs):
            if t is not None:
                sizes.append(list(t.shape))
                if k in packed:
                    sizes[-1][packed_dim] = sizes[-1][packed_dim] // 2
        base = torch.broadcast_shapes(*sizes)
        torch._check(
            0 <= self.event_ndim <= len(base),
            lambda: f"event_ndim is {self.event_ndim} for the shape {list(base)}",
        )
        self.shape = (*sample_shape, *base)
        self.order = self._order(len(sample_shape), bool(base), 0 in packed)

    def _order(self, samples: int, has_rows: bool, packed: bool) -> list[int]:
        """The dimensions, outermost first: those of an event as they lie in the first input."""
        rank = len(self.shape)
        order = list(range(rank))
        lead = rank - self.event_ndim if self.event_ndim else samples + has_rows
        strides: dict[int, int] = {}
        for d in range(lead, rank):
            own = d - rank + self.first.dim()
            halves = packed and own == self.packed_dim  # have a place even where each has size 1
            broadcast = own < 0 or (self.first.shape[own] == 1 and not halves)
            strides[d] = 0 if broadcast else self.first.stride(own)
            if self.shape[d] == 1:
                strides[d] = strides[d] if halves else -1  # no place of its own
            elif strides[d] == 0:
                return order
        # Insertion keeps the comparisons of symbolic strides few, and none where they are in order.
        outermost = [d for d in strides if strides[d] == -1]
        others: list[int] = []
        for d in strides:
            if strides[d] != -1:
                at = len(others)
                while at and strides[others[at - 1]] < strides[d]:
                    at -= 1
                others.insert(at, d)
        return [*order[:lead], *outermost, *others]

    def _empty(
        self, sizes: Sequence[int], dtype: torch.dtype, trailing: int = 0, *, rows: bool = False
    ) -> Tensor:
        """A dense tensor in the common order, or in C order if it holds one number a row."""
        strides, stride = [0] * len(sizes), 1
        skip = len(self.shape) - trailing - len(sizes)
        order = range(len(self.shape)) if rows else self.order
        for d in reversed(order):
            if 0 <= d - skip < len(sizes):
                strides[d - skip] = stride
                size = sizes[d - skip]
                stride = stride * (1 if size == 0 else size)
        return self.first.new_empty_strided(tuple(sizes), tuple(strides), dtype=dtype)

    def output(self) -> Tensor:
        return self._empty(self.shape, self.first.dtype)

    def value(self) -> Tensor:
        rows = len(self.shape) - self.event_ndim
        return self._empty(
            self.shape[:rows], _of_values(self.first), self.event_ndim, rows=self.event_ndim > 0
        )

    def gradients(self, count: int, needs: int) -> tuple[Tensor | None, ...]:
        """Of the first `count` inputs; None for what is not wanted."""
        padded = [*self.inputs, *(None,) * count][:count]
        return tuple(
            self._empty(t.shape, t.dtype) if t is not None and needs >> k & 1 else None
            for k, t in enumerate(padded)
        )


class Schema:
    """What an op's schema tells of it, which csrc/ops/register.cpp made of its declaration.

    Attributes:
        operands: the names of its tensors but the seed and the weight.
        pairs: the first operand is [..., size], its others are of components, [components, ...].
        items: the second operand is [..., items].
        categoricals: the operands are [..., classes].
        colours: the operands are [rows, channels, pixels] and [rows, planes, pixels].
        keeps: how many tensors forward gives beside its outputs, which backward takes behind the
            operands.
        settings: the names of what follows them, in order.
    """

    def __init__(self, kernel: Any) -> None:
        arguments = [(a.name, "Tensor" in str(a.type)) for a in kernel._schema.arguments]
        others = ("seed", "weight")
        self.operands = [name for name, tensor in arguments if tensor and name not in others]
        self.settings = [name for name, _ in arguments][len(self.operands) :]
        self.draws, self.weighs = "seed" in self.settings, "weight" in self.settings
        self.sums = "event_ndim" in self.settings
        self.categoricals = "uniform_mix" in self.settings
        whole = not (self.draws or self.sums)
        self.pairs = whole and "z" in self.operands
        self.colours = whole and "parameters" in self.operands
        self.items = whole and not (self.pairs or self.colours)
        self.outputs = self.draws + self.sums + whole
        self.keeps = len(kernel._schema.returns) - self.outputs

    def split(
        self, arguments: Sequence[Any], *, gradients: bool = False
    ) -> tuple[Sequence[Any], Sequence[Any], dict[str, Any]]:
        """The upstream gradients, the operands and, by name, the settings of a call; with
        `gradients`, of `_backward` or `_with_grad`, which are given `needs` too."""
        first = self.outputs if gradients else 0
        last = first + len(self.operands)
        kept = self.keeps if gradients else 0
        names = [*self.settings]
        if gradients:
            names.insert(len(names) - ("bound" in names), "needs")
        # A bound that is not given is missing.
        settings = dict(zip(names, arguments[last + kept :], strict=False))
        return arguments[:first], arguments[first:last], settings


def schemas() -> Iterator[tuple[str, Schema]]:
    """All ops of the binary by name; none without one."""
    for qualified in sorted(torch._C._dispatch_get_all_op_names()):
        name = qualified.removeprefix("fastvae::")
        if name != qualified and hasattr(torch.ops.fastvae, f"{name}_backward"):
            yield name, Schema(getattr(torch.ops.fastvae, name).default)


def _layout(operands: Sequence[Tensor | None], settings: dict[str, Any]) -> Layout:
    packed = []
    if "packed_dim" in settings:
        pairs = range(0, len(operands), 2)
        packed = [k for k in pairs if operands[k] is not None and operands[k + 1] is None]
    return Layout(
        operands,
        packed=packed,
        packed_dim=settings.get("packed_dim", -1),
        event_ndim=settings.get("event_ndim"),
        sample_shape=settings.get("sample_shape", ()),
    )


def _forward(schema: Schema, *arguments: Any) -> Any:
    _, operands, settings = schema.split(arguments)
    if schema.pairs:
        z, components = operands[:2]
        rows = z.shape[:-1]
        if not schema.keeps:
            return z.new_empty((*rows, *components.shape[:1]))
        sums = (*z.shape[-1:], *rows) if settings["marginals"] else rows
        return z.new_empty(rows), z.new_empty(sums, dtype=torch.float64)
    if schema.colours:
        return operands[1].new_empty(operands[1].shape[:1])
    if schema.items:
        logits = operands[1]
        return logits.new_empty(logits.shape[:-1], dtype=_of_values(logits))
    if schema.categoricals:
        logits = operands[0]
        if schema.draws:
            return logits.new_empty(logits.shape)
        rows = logits.shape[: -1 - settings["event_ndim"]]
        return logits.new_empty(rows, dtype=_of_values(logits))
    layout = _layout(operands, settings)
    outputs = [layout.output()] * schema.draws + [layout.value() for _ in range(schema.sums)]
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _backward(schema: Schema, *arguments: Any) -> Any:
    _, operands, settings = schema.split(arguments, gradients=True)
    needs = settings["needs"]
    if schema.colours:
        needs &= 2  # data have no gradient
    if schema.pairs or schema.items or schema.categoricals or schema.colours:
        found = tuple(
            t.new_empty(t.shape) if t is not None and needs >> k & 1 else None
            for k, t in enumerate(operands)
        )
        return found if len(found) > 1 else found[0]
    return _layout(operands, settings).gradients(len(operands), needs)


def _with_gradient(schema: Schema, *arguments: Any) -> tuple[Tensor | None, ...]:
    _, operands, settings = schema.split(arguments, gradients=True)
    layout = _layout(operands, settings)
    return layout.value(), *layout.gradients(len(operands), settings["needs"])


def _scale(gradient: Tensor, factor: Tensor) -> None:
    return None


def _on_one_device(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The dispatcher comes here if one tensor is meta, whatever the others are."""

    def checked(*arguments: Any) -> Any:
        devices = {str(t.device) for t in arguments if isinstance(t, Tensor)}
        torch._check(
            len(devices) == 1,
            lambda: f"fastvae.{name}: tensors on {sorted(devices)}; want one device",
        )
        return function(*arguments)

    return checked


def _register(name: str, function: Callable[..., Any]) -> None:
    if hasattr(torch.ops.fastvae, name):
        torch.library.register_fake(f"fastvae::{name}", _on_one_device(name, function))


for _name, _schema in schemas():
    _register(_name, functools.partial(_forward, _schema))
    _register(f"{_name}_backward", functools.partial(_backward, _schema))
    _register(f"{_name}_with_grad", functools.partial(_with_gradient, _schema))
_register("scale_", _scale)
