"""The formulas of peers.py under `jax.jit`."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jax.extend.backend import clear_backends
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .cases import Case
from .formulas import Formulas
from .inputs import Inputs
from .peers import Program

__all__ = ["JaxProgram"]

# As in PyTorch, a call on the CPU returns when its result is there.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def _use_threads(count: int) -> None:
    """Let XLA compute on `count` threads: it reads the number when its client of the CPU starts."""
    if os.environ.get("NPROC") != str(count):
        os.environ["NPROC"] = str(count)
        clear_backends()  # and with it all arrays, of which none outlives its case


class JaxProgram(Program):
    """All levels of a case under one `jit`; each set of inputs has its own key."""

    name = "jax"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        _use_threads(case.threads)

        def op(leaves: tuple[Any, ...], key: Any) -> tuple[Any, ...]:
            if case.shape.halves:
                leaves = tuple(half for t in leaves for half in jnp.split(t, 2, axis=1))
            library = Formulas(jnp, partial(_normal_like, key))
            y = getattr(library, case.op.method)(*leaves)
            return y if isinstance(y, tuple) else (y,)

        # The data first: gradients are asked of the rest.
        constants = len(case.op.constants)

        def function(wanted: list[Any], data: list[Any], key: Any) -> list[Any]:
            keys = jax.random.split(key, len(wanted)) if len(wanted) > 1 else [key]
            calls = zip(data, wanted, keys, strict=True)
            return [op((*constant, *leaves), k) for constant, leaves, k in calls]

        def vjp(wanted: list[Any], data: list[Any], key: Any) -> Any:
            return jax.vjp(lambda w: function(w, data, key), wanted)

        def gradients(wanted: list[Any], data: list[Any], key: Any, upstream: Any) -> Any:
            outputs, pull = vjp(wanted, data, key)
            return outputs, pull(upstream)[0]

        self.sets = []
        for k, levels in enumerate(inputs.sets):
            arrays = [tuple(map(_array, level.leaves)) for level in levels]
            upstream = [
                tuple(map(_array, level.upstream)) or (jnp.ones((), arrays[0][0].dtype),)
                for level in levels
            ]
            wanted, data = [a[constants:] for a in arrays], [a[:constants] for a in arrays]
            self.sets.append(((wanted, data, jax.random.key(k)), upstream))
        self._forward = jax.jit(function)
        self._vjp = jax.jit(vjp)
        self._pull = jax.jit(lambda pull, upstream: pull(upstream)[0])
        self._both = jax.jit(gradients)

    def forward(self, k: int) -> Any:
        return self._forward(*self.sets[k][0])

    def record(self, k: int) -> Any:
        return self._vjp(*self.sets[k][0])

    def backward(self, k: int, recorded: Any) -> Any:
        return self._pull(recorded[1], self.sets[k][1])

    def both(self, k: int) -> Any:
        arguments, upstream = self.sets[k]
        return self._both(*arguments, upstream)

    def results(self, direction: str) -> tuple[list[Tensor], list[Tensor] | None]:
        if direction == "forward":
            return _tensors(self.forward(0)), None
        if direction == "backward":
            recorded = self.record(0)
            return _tensors(recorded[0]), _tensors(self.backward(0, recorded))
        outputs, grads = self.both(0)
        return _tensors(outputs), _tensors(grads)


def _normal_like(key: Any, t: Any) -> Any:
    return jax.random.normal(key, t.shape, t.dtype)


def _array(t: Tensor) -> Any:
    return jnp.from_dlpack(t.detach())


def _tensors(results: Any) -> list[Tensor]:
    return [from_dlpack(array) for array in jax.tree.leaves(results)]
