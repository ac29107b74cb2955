"""An op: which of its kernel, its definition and a node of autograd's graph computes a call.

Where there are no kernels for a tensor's device, the definition computes. Where autograd records,
a node saves the operands and the seed, nothing else, and draws the noise again in backward. Where
PyTorch wants to look inside (a backward pass that is itself recorded, `torch.func`, forward-mode
differentiation), the definition takes over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastvae import backend

from . import noise
from .bounds import Bound
from .elements import computed_in, event_sum
from .graph import Kernels

__all__ = ["OPS", "Op", "Request", "has_kernels"]

R = TypeVar("R")

Request = tuple[Sequence[Tensor | None], dict[str, Any]]
"""The operands (None: left out) and, by name and in the order of the kernel, the settings. A seed
that is None is drawn when the op runs."""

OPS: dict[str, Op[Any]] = {}
"""All that are declared, by name."""


def has_kernels(tensor: Tensor) -> bool:
    """Whether the native path serves a tensor's device now."""
    return backend.native_enabled() and (
        (tensor.is_cpu and backend.HAS_CPU) or (tensor.is_cuda and backend.HAS_CUDA)
    )


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
        request: Callable[..., Request],
        params: Sequence[str],
        whole: bool,
    ) -> None:
        self.name = name
        self.whole = whole
        self._params = params
        self.request = request
        self._formula = formula
        parameters = inspect.signature(formula).parameters.values()
        self._given = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        self._operands = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self._kernels = kernels = Kernels(self) if backend.HAS_BINARY else None
        self.ordinary_call = kernels.ordinary_call if kernels else None
        self.ordinary_loss = kernels.ordinary_loss if kernels else None

    def run(self, operands: Sequence[Tensor | None], settings: dict[str, Any]) -> R:
        """One call, by whatever computes it best."""
        first = operands[0]
        assert first is not None
        if self._kernels is None or not has_kernels(first):
            return self.define(operands, settings)
        return self._kernels.run(operands, settings)

    def run_loss(
        self, operands: Sequence[Tensor | None], settings: dict[str, Any], reduction: str
    ) -> Tensor | None:
        """The mean or sum over all rows of minus the value, with its gradients made in the same
        pass; None where that cannot be."""
        first = operands[0]
        assert first is not None
        if self._kernels is None or not has_kernels(first):
            return None
        return self._kernels.run_loss(operands, settings, reduction)

    def define(self, operands: Sequence[Tensor | None], settings: dict[str, Any]) -> R:
        """The op in plain PyTorch: differentiable any number of times, on any device."""
        first = operands[0]
        assert first is not None
        packed_dim = settings.get("packed_dim", -1)
        if packed_dim >= 0:
            given = [t for t in operands if t is not None]
            operands = [half for t in given for half in t.chunk(2, packed_dim)]
            operands += [None] * (len(self._operands) - len(operands))
        tensors: list[Any] = [None if t is None else computed_in(t) for t in operands]
        if "scale" in settings and tensors[-1] is None:  # a number is not rounded to a half type
            x = computed_in(first)
            tensors[-1] = torch.full((), settings["scale"], dtype=x.dtype, device=x.device)
        if settings.get("bound") is not None:
            k = self._operands.index("logvar")
            tensors[k] = Bound.from_numbers(settings["bound"])(tensors[k])
        if self.whole:
            if "param" in settings:
                settings = {**settings, "param": self._params[settings["param"]]}
            return self._formula(*tensors, **{name: settings[name] for name in self._given})
        shape = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
        sample_shape = tuple(settings.get("sample_shape", ()))
        values = dict(settings)
        if "param" in values:
            values["param"] = self._params[values["param"]]
        if "seed" in values:
            seed = noise.draw(first.device) if values["seed"] is None else values["seed"]
            eps = noise.noise(seed, shape, sample_shape=sample_shape)
            values["eps"] = eps.to(computed_in(first).dtype)
        outputs = self._formula(*tensors, **{name: values[name] for name in self._given})
        found: list[Any] = [*outputs] if isinstance(outputs, tuple) else [outputs]
        if "seed" in settings:
            found[0] = found[0].to(first.dtype)
        if "event_ndim" in settings:
            whole = torch.Size((*sample_shape, *shape))
            found[-1] = event_sum(found[-1], whole, settings["event_ndim"])
        return tuple(found) if isinstance(outputs, tuple) else found[0]  # type: ignore[return-value]
