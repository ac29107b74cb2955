"""An op's kernels, and the nodes by which autograd records them.

Where the library `fastvae._nodes` was built for the torch that runs, a call of plain tensors goes
straight there: checks of what autograd needs, the seed, the kernel and the node are one C++ call.
Otherwise, and for all other tensors, a `torch.autograd.Function` over `torch.ops.fastvae` does the
same. Both end in `Kernels.gradients`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvae import backend

from . import layout, noise
from .arguments import common_shape

if TYPE_CHECKING:
    from .op import Op

__all__ = ["Kernels", "recorded", "recording", "transformed"]

Gradients = tuple[Tensor | None, ...]


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def recording() -> bool:
    """Whether this backward pass will be differentiated, or is transformed."""
    return torch.is_grad_enabled() or transformed()


class Kernels:
    """What `torch.ops.fastvae` has for an op, by the order of arguments that its schema tells."""

    def __init__(self, op: Op[Any]) -> None:
        self._define = op.define
        self.forward = getattr(torch.ops.fastvae, op.name).default
        self.backward = getattr(torch.ops.fastvae, f"{op.name}_backward").default
        with_gradient = getattr(torch.ops.fastvae, f"{op.name}_with_grad", None)
        self.with_gradient = getattr(with_gradient, "default", None)
        self.schema = schema = layout.Schema(self.forward)
        self.count = len(schema.operands)
        self.tensors = self.count + schema.draws + schema.weighs  # of the arguments, the first
        self._bounded = int("bound" in schema.settings)  # behind `needs`
        self._only_samples = schema.draws and not (schema.sums or schema.categoricals)
        self._node = _make_node(self, op.name, self.forward, self.backward)
        self._call = _builtin(self.forward)
        self._record = _direct(_make_node(self, op.name, self._call, _builtin(self.backward)))
        self._record_loss = _direct(_make_loss(self, op.name)) if self.with_gradient else None
        self.ordinary_call = self.ordinary_loss = self._run = None
        if nodes := backend.nodes():
            # What is whole is reshaped first.
            parameters = () if op.whole else _parameters(op.request)
            index = nodes.register(op.name, parameters, self.gradients)
            self.ordinary_call = None if op.whole else functools.partial(nodes.call, index)
            self.ordinary_loss = functools.partial(nodes.loss, index) if with_gradient else None
            self._run = functools.partial(nodes.run, index)

    def run(self, operands: Sequence[Tensor | None], settings: dict[str, Any]) -> Any:
        compiling = torch.compiler.is_compiling()
        if self._run is not None and not compiling:
            result = self._run(operands, settings)
            if result is not NotImplemented:
                return result
        if settings.get("seed", 0) is None:
            settings["seed"] = noise.draw(operands[0].device)  # type: ignore[union-attr]
        if transformed():
            return self._define(operands, settings)
        if compiling:  # which knows this form, and leaves out what needs no gradient
            return self._node.apply(*operands, *settings.values())
        if torch.is_grad_enabled():
            for t in operands:
                if t is not None and t.requires_grad:
                    return self._record(*operands, *settings.values())
        found = self._call(*operands, *settings.values())
        return found[0] if self.schema.keeps else found

    def run_loss(
        self, operands: Sequence[Tensor | None], settings: dict[str, Any], reduction: str
    ) -> Tensor | None:
        if self._record_loss is None or torch.compiler.is_compiling():
            return None
        first = operands[0]
        assert first is not None
        wanted = False
        for t in operands:
            if t is not None:
                if type(t) not in (Tensor, torch.nn.Parameter):
                    return None
                wanted = wanted or t.requires_grad
        shape = common_shape(operands)
        wanted = wanted and torch.is_grad_enabled() and shape.numel() > 0
        if not wanted or first.dtype == torch.float16 or transformed():
            return None
        rows = shape[: len(shape) - settings["event_ndim"]]
        factor = 1.0 if reduction == "sum" else 1.0 / rows.numel()
        whole = {**settings, "event_ndim": len(shape)}
        return self._record_loss(factor, *operands, *whole.values())

    def gradients(
        self,
        saved: Sequence[Tensor | None],
        settings: Sequence[Any],
        needs: Sequence[bool],
        grads: Sequence[Tensor | None],
        backward: Callable[..., Any] | None = None,
    ) -> Gradients:
        """Of the operands, for upstream gradients `grads` of the outputs.

        Args:
            saved: the operands, and what forward kept, the seed and the weight, where the op has
                them.
            settings: all others.
            needs: which of the operands' gradients are wanted.
            backward: a form of the kernel's.
        """
        backward = backward or self.backward
        if grads[0] is None and all(g is None for g in grads):
            return (None,) * self.count
        if recording():
            operands, others = saved[: self.count], saved[self.count + self.schema.keeps :]
            names = self.schema.settings

            def formula(*leaves: Tensor | None) -> Any:
                return self._define(leaves, dict(zip(names, (*others, *settings), strict=True)))

            return recorded(formula, operands, needs, grads)
        z = grads[0]
        if self._only_samples and saved[1] is not None and z.shape == saved[0].shape:  # type: ignore[union-attr]
            # dz/dmu is 1: the kernel need not copy.
            found = self.call(backward, grads, saved, settings, (False, *needs[1:]))
            return (z if needs[0] else None, *found[1:])
        return self.call(backward, grads, saved, settings, needs)

    def call(
        self,
        kernel: Callable[..., Any],
        grads: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
        settings: Sequence[Any],
        needs: Sequence[bool],
    ) -> Any:
        """`_backward` or `_with_grad`, in the order of their schemas."""
        split = len(settings) - self._bounded
        bits = 0
        for k, need in enumerate(needs):
            bits |= need << k
        found = kernel(*grads, *saved, *settings[:split], bits, *settings[split:])
        return found if isinstance(found, tuple) else (found,)


def _parameters(function: Callable[..., Any]) -> tuple[tuple[Any, ...], ...]:
    """Their names and defaults."""
    parameters = inspect.signature(function).parameters.values()
    return tuple((p.name,) if p.default is p.empty else (p.name, p.default) for p in parameters)


def _builtin(kernel: Any) -> Callable[..., Any]:
    """Without the Python around it, which the compiler wants to see."""
    return kernel._op


def _direct(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """PyTorch's own `apply` first unwraps what may be left of functorch's wrappers, in each
    argument (pytorch#189573). Where functorch is at work nothing comes here, and the kernels below
    unwrap what is left."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _make_node(
    kernels: Kernels, name: str, kernel: Callable[..., Any], kernel_backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The Function of an op: its arguments are the kernel's."""
    tensors, count, keeps = kernels.tensors, kernels.count, kernels.schema.keeps
    others = (None,) * len(kernels.schema.settings)

    # The older form: with `setup_context` every call would pay 13 us for `inspect.signature`.
    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.settings = arguments[tensors:]
        ctx.set_materialize_grads(False)
        found = kernel(*arguments)
        kept = found[1:] if keeps else ()
        ctx.save_for_backward(*arguments[:count], *kept, *arguments[count:tensors])
        return found[0] if keeps else found

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[:count]
        saved = ctx.saved_tensors
        found = kernels.gradients(saved, ctx.settings, needs, grads, kernel_backward)
        return *found, *others

    return _function(name, forward, backward)


def _make_loss(kernels: Kernels, name: str) -> type[torch.autograd.Function]:
    """`-factor` times the sum of a likelihood's values, with its gradients made in forward.

    Backward multiplies them by the upstream gradient in place, and does nothing where that is 1; on
    a GPU the device finds out. They are given away with that, so a second backward pass through the
    same graph computes them anew.
    """

    kernel = _builtin(kernels.with_gradient)

    def forward(ctx: Any, factor: float, *arguments: Any) -> Tensor:
        operands, settings = arguments[: kernels.count], arguments[kernels.count :]
        x = operands[0]
        ctx.grad = _constant(-factor, x.dtype == torch.float64, x.device)
        value, *ctx.grads = kernels.call(
            kernel,
            (ctx.grad,),
            operands,
            settings,
            ctx.needs_input_grad[1 : 1 + kernels.count],
        )
        ctx.save_for_backward(*operands)
        ctx.settings = settings
        return value * ctx.grad

    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        found, ctx.grads = ctx.grads, None
        if found is None or recording():
            needs = ctx.needs_input_grad[1 : 1 + kernels.count]
            upstream = (grad_loss * ctx.grad,)
            found = kernels.gradients(ctx.saved_tensors, ctx.settings, needs, upstream)
        else:
            for gradient in found:
                if gradient is not None:
                    _multiply_(gradient, grad_loss)
        return None, *found, *(None for _ in ctx.settings)

    return _function(name.replace("log_prob", "nll_loss"), forward, backward)


@functools.lru_cache(maxsize=64)
def _constant(value: float, double: bool, device: torch.device) -> Tensor:
    """Nobody writes to it."""
    dtype = torch.float64 if double else torch.float32
    return torch.full((), value, dtype=dtype, device=device)


def _function(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """Named as PyTorch's own are: RsampleKl, hence the node RsampleKlBackward."""
    words = "".join(word.capitalize() for word in name.split("_"))
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(words, (torch.autograd.Function,), methods)


def _multiply_(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies in place, unless by 1; never waits for a device."""
    if gradient.is_cuda:
        torch.ops.fastvae.scale_(gradient, factor)
    elif factor != 1:
        gradient.mul_(factor)


def recorded(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> Gradients:
    """Gradients of `inputs` by autograd through `formula`, recorded to be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # off while `vmap` goes over several upstream gradients
        # Views of their own: one tensor given twice must not get the sum of both gradients twice.
        leaves = [None if t is None else t.view_as(t) for t in inputs]
        outputs = formula(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs],
            [leaf for leaf in wanted if leaf is not None],
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return tuple(next(found) if need else None for need in needs)
