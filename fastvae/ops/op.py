"""An op: which of its kernel, its formulas and a node of autograd's graph computes a call.

Where autograd records, a node of the kernels saves the operands, the seed and, of a mixture, one
number for each row, nothing else, and draws the noise again in backward. Where PyTorch wants to
look inside (a backward pass that is itself recorded, `torch.func`, forward-mode differentiation),
the definition takes over. Where there are no kernels for a tensor's device, the eager formula
computes.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastvae import backend

from . import eager, noise
from .arguments import common_shape
from .bounds import Numbers, Raised, from_numbers
from .elements import computed_in, event_sum, is_half
from .graph import Kernels, transformed
from .layout import Schema
from .remembered import FormulaCall

__all__ = ["OPS", "Op", "Request", "has_kernels"]

R = TypeVar("R")

Request = tuple[Sequence[Tensor | None], dict[str, Any]]
"""The operands (None: left out) and, by name and in the order of the kernel, the settings. A seed
that is not given, but None or a generator to draw it from, is drawn when the op runs."""

OPS: dict[str, Op[Any]] = {}
"""All that are declared, by name."""


def has_kernels(tensor: Tensor) -> bool:
    """Whether the native path serves a tensor's device now."""
    return backend.path(tensor) == "native"


class Formula:
    """A formula of tensors, and the names of its parameters.

    Attributes:
        operands: those by position.
        given: the keyword-only ones.
        draws: whether noise is among them: `eps`, or `uniforms`, those between 0 and 1, which are
            one for each group of classes.
        sums: whether it is given the event's sizes, over which it sums.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        self.given = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        self.operands = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self.draws, self.sums = (
            not {"eps", "uniforms"}.isdisjoint(self.given),
            "event" in self.given,
        )


def _unpacked(operands: Sequence[Tensor | None], settings: dict[str, Any]) -> list[Tensor | None]:
    """The operands, with a packed Gaussian as two."""
    if settings.get("packed_dim", -1) < 0:
        return [*operands]
    given = [t for t in operands if t is not None]
    halves: list[Tensor | None] = [h for t in given for h in t.chunk(2, settings["packed_dim"])]
    return halves + [None] * (len(operands) - len(halves))


def _once(normals: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same noise at every call."""
    drawn: list[Tensor] = []

    def draw(*arguments: Any) -> Tensor:
        if not drawn:
            drawn.append(normals(*arguments))
        return drawn[0]

    return draw


class Op(Generic[R]):
    """See `declare`.

    Attributes:
        whole: see `declare`.
        name: of the public function, of the kernel, and of the operator of `torch.ops.fastvae`.
        request: checks the public function's arguments.
        ordinary_call, ordinary_loss: take the public function's arguments, and those of the loss
            that ends in it, if there is nothing special about them; else they return
            NotImplemented. None where the library of nodes is not there.
    """

    def __init__(
        self,
        name: str,
        formula: Callable[..., R],
        eager: Callable[..., R],
        request: Callable[..., Request],
        params: Sequence[str],
        whole: bool,
    ) -> None:
        self.name = name
        self.whole = whole
        self._params = params
        self.request = request
        self._definition, self._eager = Formula(formula), Formula(eager)
        self._kernels = kernels = self._find_kernels()
        self.ordinary_call = kernels.ordinary_call if kernels else None
        self.ordinary_loss = kernels.ordinary_loss if kernels else None

    def _find_kernels(self) -> Kernels | None:
        """None without a binary, or where it is of another version, with other arguments."""
        if not backend.HAS_BINARY:
            return None
        if (operator := getattr(torch.ops.fastvae, self.name, None)) is not None:
            schema = Schema(operator.default)
            settings = schema.settings
            if not self.whole:  # whose shapes are not any
                _, given = self.request(*(torch.zeros(1) for _ in self._definition.operands))
                settings = [*given]
            if (schema.operands, schema.settings) == (self._definition.operands, settings):
                return Kernels(self)
        backend.lacks(self.name)
        return None

    def run(self, operands: Sequence[Tensor | None], settings: dict[str, Any]) -> R:
        """One call, by whatever computes it best."""
        first = operands[0]
        assert first is not None
        path = self.path(first)
        if path == "eager":
            return self.eager(operands, settings)
        by_compiler = path == "compiled" and not (is_compiling() or transformed())
        source = settings.get("seed", 0)
        if isinstance(source, torch.Generator) or (source is None and by_compiler):
            settings["seed"] = noise.draw(first.device, source)
        if self._kernels is not None and path == "native":
            return self._kernels.run(operands, settings)
        return (self._compiled if by_compiler else self.define)(operands, settings)

    def run_loss(
        self, operands: Sequence[Tensor | None], settings: dict[str, Any], reduction: str
    ) -> Tensor | None:
        """The mean or sum over all rows of minus the value, with its gradients made in the same
        pass; None where that cannot be."""
        first = operands[0]
        assert first is not None
        path = self.path(first)
        if self._kernels is not None and path == "native":
            return self._kernels.run_loss(operands, settings, reduction)
        if path != "eager" or self.whole:
            return None
        shape = common_shape(operands)
        rows = shape[: len(shape) - settings["event_ndim"]].numel() if reduction == "mean" else 1
        total: Any = self.eager(operands, {**settings, "event_ndim": len(shape)})
        return total / -rows

    def find_eager(self, *args: Any, **kwargs: Any) -> FormulaCall | None:
        """What a call comes to where all that computes is the eager formula, of the tensors as they
        are; None if there is more to be done."""
        operands, settings = self.request(*args, **kwargs)
        formula, first = self._eager, operands[0]
        assert first is not None
        given = (*(a if isinstance(a, Tensor) else None for a in args), *(None,) * len(operands))
        special = ("weight", "seed")
        if (
            self.whole
            or is_half(first)
            or not all(a is b for a, b in zip(operands, given))  # noqa: B905
            or any(settings.get(name) is not None for name in special)
            or settings.get("sample_shape")
            or settings.get("packed_dim", -1) >= 0
            or ("event_ndim" in settings and not formula.sums)
        ):
            return None
        shape = common_shape(operands)
        if formula.draws and any(t is not None and t.shape != shape for t in operands):
            return None
        others = [t for t in operands if t is None]
        if others and "scale" in settings:
            others[-1] = settings["scale"]
        values = self._values(formula, settings, shape)
        count, bound = len(operands) - len(others), settings.get("bound")
        read = None if bound is None else self._read(formula, bound, values)
        return FormulaCall(formula.function, count, (*others,), values, formula.draws, read)

    def find_eager_loss(
        self, *args: Any, reduction: str = "mean", **kwargs: Any
    ) -> FormulaCall | None:
        """The same of the loss that ends in the op."""
        call = self.find_eager(*args, **kwargs)
        if call is None or reduction not in ("mean", "sum"):
            return None
        shape = common_shape([a for a in args if isinstance(a, Tensor)])
        event = call.values["event"]
        rows = shape[: len(shape) - len(event)].numel() if reduction == "mean" else 1
        return call._replace(values={**call.values, "event": shape}, divisor=-rows)

    def _values(
        self, formula: Formula, settings: dict[str, Any], shape: torch.Size
    ) -> dict[str, Any]:
        """What a formula is given by name, but for noise."""
        values = {name: settings[name] for name in formula.given if name in settings}
        if "param" in values:
            values["param"] = self._params[values["param"]]
        if formula.sums:
            values["event"] = shape[len(shape) - settings["event_ndim"] :]
        return values

    def _read(
        self, formula: Formula, bound: Numbers, values: dict[str, Any]
    ) -> tuple[int, Callable[[Tensor], Tensor]]:
        """Which operand is bounded, and how; `values` learn what it is then."""
        k, read = formula.operands.index("logvar"), from_numbers(bound)
        if formula is self._eager and isinstance(read, Raised) and read.floor > 0:
            values["param"] = "sigma"
            return k, read.sigma
        return k, read

    def path(self, tensor: Tensor) -> str:
        """What computes with a tensor of this device now, one of `backend.CHOICES`."""
        path = backend.path(tensor)
        return "eager" if path == "native" and self._kernels is None else path

    def define(self, operands: Sequence[Tensor | None], settings: dict[str, Any]) -> R:
        """The op in plain PyTorch: differentiable any number of times, on any device."""
        return self._evaluate(self._definition, noise.normals_of_seed, operands, settings)

    def define_with(
        self,
        normals: Callable[..., Tensor],
        operands: Sequence[Tensor | None],
        settings: dict[str, Any],
    ) -> R:
        """The same with noise of the caller's, who is given the source and the shapes."""
        return self._evaluate(self._definition, normals, operands, settings)

    def eager(self, operands: Sequence[Tensor | None], settings: dict[str, Any]) -> R:
        """The same by the formula that is as fast as eager code goes, for ordinary tensors, and
        with PyTorch's own noise unless a seed is given."""
        formula = self._definition if is_compiling() or transformed() else self._eager
        for t in operands:
            if type(t) is not Tensor and not (t is None or type(t) is torch.nn.Parameter):
                formula = self._definition
        return self._evaluate(formula, noise.normals_of, operands, settings)

    @functools.cached_property
    def _compiled(self) -> Callable[..., R]:
        # A code object for each op: dynamo counts what it compiles by that.
        code = Op.define.__code__.replace(co_name=self.name)
        define = types.FunctionType(code, Op.define.__globals__, self.name)
        return torch.compile(types.MethodType(define, self))

    def _weighted(
        self,
        formula: Formula,
        normals: Callable[..., Tensor],
        operands: Sequence[Tensor | None],
        settings: dict[str, Any],
    ) -> R:
        """The sum of the elements' values, each times its weight. What weighs 0 is left out: it is
        computed for 1, a place where every op and its gradients are finite, or what comes out is
        dropped."""
        weight, elements = settings["weight"], {**settings, "weight": None, "event_ndim": 0}
        tensors, normals = _unpacked(operands, elements), _once(normals)
        elements["packed_dim"] = -1
        if formula is self._eager:
            bits, some = eager.counting(weight, tensors, common_shape(tensors))
            multiply = functools.partial(eager.weighted, weight, bits)
        else:
            counts = weight != 0
            some = [None if t is None else torch.where(counts, t, 1) for t in tensors]
            multiply = weight.mul
        outputs: Any = self._evaluate(formula, normals, some, elements)
        several = isinstance(outputs, tuple)
        product = multiply(outputs[-1] if several else outputs)
        total = event_sum(product, product.shape, settings["event_ndim"])
        if not several:
            return total  # type: ignore[return-value]
        # z is drawn everywhere, but where nothing counts only what is finite gets a gradient.
        counts = weight != 0
        alive = [
            None if t is None else torch.where(counts | t.isfinite(), t, t.detach())
            for t in tensors
        ]
        drawn: Any = self._evaluate(formula, normals, alive, elements)
        return drawn[0], total  # type: ignore[return-value]

    def _evaluate(
        self,
        formula: Formula,
        normals: Callable[..., Tensor],
        operands: Sequence[Tensor | None],
        settings: dict[str, Any],
    ) -> R:
        first = operands[0]
        assert first is not None
        if settings.get("weight") is not None:
            return self._weighted(formula, normals, operands, settings)
        tensors: list[Any] = _unpacked(operands, settings)
        if self.whole:
            tensors = [None if t is None else computed_in(t) for t in operands]
            values = self._values(formula, settings, first.shape)
            if not formula.draws:
                return formula.function(*tensors, **values)
            values["uniforms"] = noise.uniforms_of_seed(settings["seed"], first)
            return formula.function(*tensors, **values).to(first.dtype)
        if half := is_half(first):
            tensors = [None if t is None else computed_in(t) for t in operands]
        like, bound = tensors[0], settings.get("bound")
        shape = common_shape(tensors)
        if tensors[-1] is None and "scale" in settings:  # a number is not rounded to a half type
            scale = settings["scale"]
            if not formula.sums or bound is not None:
                scale = torch.full((), scale, dtype=like.dtype, device=like.device)
            tensors[-1] = scale
        sample_shape = settings.get("sample_shape", ())
        values = self._values(formula, settings, shape)
        if bound is not None:
            k, read = self._read(formula, bound, values)
            tensors[k] = read(tensors[k])
        if formula.draws:
            values["eps"] = normals(settings["seed"], shape, sample_shape, like)
        outputs = formula.function(*tensors, **values)
        several = isinstance(outputs, tuple)
        *samples, value = outputs if several else (outputs,)
        if "event_ndim" not in settings:
            return value.to(first.dtype) if half else value
        whole = torch.Size((*sample_shape, *shape))
        if not formula.sums:
            value = event_sum(value, whole, settings["event_ndim"])
        elif value.shape != (rows := whole[: len(whole) - settings["event_ndim"]]):
            value = value.expand(rows).clone()
        if several:
            return samples[0].to(first.dtype) if half else samples[0], value  # type: ignore[return-value]
        return value
