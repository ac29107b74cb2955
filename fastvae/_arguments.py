"""Checks and canonical forms of arguments, made once for every op, backend and device.

Nothing here looks at values: on a GPU that would wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from numbers import Real
from typing import cast

import torch
from torch import Tensor

from .bounds import Bound, Numbers

__all__ = [
    "PARAMS",
    "TensorLike",
    "check_bound",
    "check_levels",
    "check_param",
    "check_reduction",
    "check_sample_shape",
    "event_dims",
    "gaussian_arguments",
    "gaussians",
    "log_prob_arguments",
    "make_seed",
]

TensorLike = Tensor | float

PARAMS = ("logvar", "log_std", "std", "var")  # in the order of the kernels' codes
_CODES = {name: code for code, name in enumerate(PARAMS)}
# The kernels follow this many dimensions that alternate between broadcast and not (csrc/plan.h).
_MAX_BROADCAST_NDIM = 7
_CPU_SEED = torch.zeros((), dtype=torch.int64, device="cpu")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_param(param: str) -> int:
    """The kernels' code of a parameterization.

    Raises:
        ValueError: `param` is not one of `PARAMS`.
    """
    try:
        return _CODES[param]
    except (KeyError, TypeError):
        raise ValueError(
            f"param is {param!r}; want one of {', '.join(map(repr, PARAMS))}"
        ) from None


def check_bound(bound: Bound | None, param: str) -> Numbers | None:
    """A bound as the kernels take it.

    Raises:
        TypeError: `bound` is no `Bound`.
        ValueError: what it would apply to is not a log-variance.
    """
    if bound is None:
        return None
    if not isinstance(bound, Bound):
        raise TypeError(f"bound is a {type(bound).__name__}; want a fastvae.Bound or None")
    if param != "logvar":
        raise ValueError(f"bound is given and param is {param!r}; want param='logvar' with it")
    return bound.numbers


def check_reduction(reduction: str) -> None:
    """Raises ValueError if `reduction` is neither "mean" nor "sum"."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; want 'mean' or 'sum'")


def check_levels(bins: int, low: float, high: float) -> None:
    """Raises ValueError if there are no `bins` levels from `low` to `high`."""
    if bins < 2:
        raise ValueError(f"bins is {bins}; want at least 2")
    if not low < high:
        raise ValueError(f"low is {low} and high is {high}; want low below high")


def event_dims(event_ndim: int | None, ndim: int) -> int:
    """How many trailing dimensions of `ndim` are one event: by default all but the first."""
    if event_ndim is None:
        return max(ndim - 1, 0)
    if isinstance(event_ndim, bool) or not isinstance(event_ndim, int):
        raise TypeError(f"event_ndim is {event_ndim!r}; want an int or None")
    if not 0 <= event_ndim <= ndim:
        raise ValueError(f"event_ndim is {event_ndim}; want 0 to {ndim} for {ndim} dimensions")
    return event_ndim


def gaussian_arguments(**arguments: TensorLike) -> tuple[list[Tensor], torch.Size]:
    """Floating-point tensors of one dtype and device, and the shape they broadcast to.

    Under autocast, where layers give half types and data stays float32, dtypes may differ: the
    widest is taken.

    Python numbers become 0-d tensors like the first tensor; with no tensor at all, they take
    PyTorch's default dtype. The tensors keep their own shapes: kernels broadcast while reading.

    Raises:
        TypeError: an argument is no tensor or number, or not of a supported floating dtype, or the
            dtypes differ.
        ValueError: the devices differ, or the shapes do not broadcast.
    """
    first, *others = arguments.values()
    if isinstance(first, Tensor):
        shape, dtype, device = first.shape, first.dtype, first.device
        alike = dtype in _DTYPES
        for value in others:
            alike = (
                alike
                and isinstance(value, Tensor)
                and value.shape == shape
                and value.dtype == dtype
                and value.device == device
            )
        if alike:
            return [first, *cast(list[Tensor], others)], shape
    return _canonical(arguments)


def gaussians(
    mu: TensorLike,
    logvar: TensorLike,
    prior_mu: TensorLike | None,
    prior_logvar: TensorLike | None,
) -> tuple[list[Tensor], torch.Size]:
    """The tensors of q, or of q and p, as `gaussian_arguments` makes them."""
    if prior_mu is None and prior_logvar is None:
        return gaussian_arguments(mu=mu, logvar=logvar)
    if prior_mu is None or prior_logvar is None:
        missing = "prior_mu" if prior_mu is None else "prior_logvar"
        raise ValueError(f"{missing} is None; want both prior_mu and prior_logvar, or neither")
    return gaussian_arguments(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)


def log_prob_arguments(
    x: TensorLike, mean: TensorLike, **scale: TensorLike
) -> tuple[tuple[Tensor, Tensor, Tensor | None], float, torch.Size]:
    """The tensors of a log-likelihood, the number that stands for its scale, their shape.

    A number is not made a tensor, so that it is not rounded to a half type.
    """
    (value,) = scale.values()
    if isinstance(value, int | float):
        (x, mean), shape = gaussian_arguments(x=x, mean=mean)
        return (x, mean, None), float(value), shape
    (x, mean, value), shape = gaussian_arguments(x=x, mean=mean, **scale)
    return (x, mean, value), 0.0, shape


def _canonical(arguments: dict[str, TensorLike]) -> tuple[list[Tensor], torch.Size]:
    given = ((name, value) for name, value in arguments.items() if isinstance(value, Tensor))
    default = "the default", torch.empty((), dtype=torch.get_default_dtype())
    first_name, first = next(given, default)
    # PyTorch has no autocast for meta tensors, and an error for the question.
    promotes = not first.is_meta and torch.is_autocast_enabled(first.device.type)
    tensors: list[Tensor] = []
    for name, value in arguments.items():
        if isinstance(value, Real):
            value = torch.full((), float(value), dtype=first.dtype, device=first.device)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; want a tensor or a number")
        if value.dtype not in _DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"{name} has dtype {value.dtype}; want one of {names}")
        if value.dtype != first.dtype and not promotes:
            raise TypeError(
                f"{name} has dtype {value.dtype}, {first_name} has {first.dtype}; want one dtype"
            )
        if value.device != first.device:
            raise ValueError(
                f"{name} is on {value.device}, {first_name} on {first.device}; want one device"
            )
        tensors.append(value)
    if promotes:
        widest = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        tensors = [tensor.to(widest) for tensor in tensors]
    try:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        if len(shape) > _MAX_BROADCAST_NDIM:
            tensors = [tensor.expand(shape).contiguous() for tensor in tensors]
        return tensors, shape
    except RuntimeError:
        shapes = ", ".join(
            f"{name} {list(tensor.shape)}" for name, tensor in zip(arguments, tensors, strict=True)
        )
        raise ValueError(f"shapes do not broadcast: {shapes}") from None


def make_seed(
    seed: Tensor | int | None,
    generator: torch.Generator | None,
    device: torch.device,
    batch: int | None,
) -> Tensor:
    """The seed tensor of a call: drawn from `generator` if None is given.

    `batch` is the size of dimension 0, the only length that a per-row seed may have.
    """
    if seed is None:
        if generator is not None and torch.compiler.is_compiling():
            # No graph holds a generator, for PyTorch's own ops neither: an error if one graph is
            # demanded (fullgraph=True), else this call runs between two graphs.
            torch._dynamo.graph_break(
                msg="generator= cannot be compiled; want seed=fastvae.draw_seed(generator), drawn "
                "outside of the compiled function and passed to it"
            )
        return _draw(device, generator)
    if generator is not None:
        raise ValueError("seed and generator are both given; want one of them")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed has dtype {seed.dtype}; want torch.int64")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device}; want {device}, where the input is")
        if seed.dim() != 0 and (batch is None or seed.shape != (batch,)):
            rows = "" if batch is None else f", or [{batch}]: one for each row"
            raise ValueError(f"seed has shape {list(seed.shape)}; want []{rows}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; want an int, an int64 tensor or None")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}; want a signed 64-bit integer")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _draw(device: torch.device, generator: torch.Generator | None) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler takes this form only; its numbers are the same
        if torch._functorch.config.activation_memory_budget < 1:
            # PyTorch 2.13 then draws again in backward, and other numbers: wrong gradients.
            raise RuntimeError(
                "seed is None under torch.compile with an activation_memory_budget below 1; want "
                "seed=fastvae.draw_seed(...), drawn outside of the compiled function"
            )
        seed = torch.empty((), dtype=torch.int64, device=device)
        return torch.ops.aten.random.default(seed, generator=generator)
    seed = _empty_seed(device)
    if torch._C._are_functorch_transforms_active() and _under_vmap():
        # Of all random operations of integers, this one obeys vmap's `randomness`.
        return torch.randint(2**63 - 1, (), dtype=seed.dtype, device=device, generator=generator)
    return seed.random_(generator=generator)


def _under_vmap() -> bool:
    functorch = torch._C._functorch
    return any(
        interpreter.key() == functorch.TransformType.Vmap
        for interpreter in functorch.get_interpreter_stack() or ()
    )


def _empty_seed(device: torch.device) -> Tensor:
    # Half the time of the general case, which is 3 % of a small op's; but modes such as
    # FakeTensorMode know no tensor that they have not made.
    if device.type == "cpu" and not torch._C._len_torch_dispatch_stack():
        return torch.empty_like(_CPU_SEED)
    return torch.empty((), dtype=torch.int64, device=device)


def check_sample_shape(sample_shape: Sequence[int]) -> torch.Size:
    """`sample_shape` as a torch.Size."""
    try:
        size = torch.Size(sample_shape)
    except TypeError:
        raise TypeError(f"sample_shape is {sample_shape!r}; want a sequence of ints") from None
    if any(n < 0 for n in size):
        raise ValueError(f"sample_shape is {list(size)}; want no negative size")
    return size
