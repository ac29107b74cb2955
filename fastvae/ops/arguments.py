"""Checks and canonical forms of arguments, made once for every op, backend and device.

Nothing here looks at values: on a GPU that would wait for the device.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from numbers import Real
from typing import SupportsIndex, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .bounds import Bound, Numbers, Raised

__all__ = [
    "PARAMS",
    "TensorLike",
    "as_shape",
    "check_bound",
    "check_levels",
    "check_param",
    "check_reduction",
    "check_sample_shape",
    "common_shape",
    "event_dims",
    "gaussians",
    "log_prob_arguments",
    "tensor_arguments",
    "weight_argument",
    "whole",
]

TensorLike = Tensor | float

PARAMS = ("logvar", "log_std", "std", "var")  # in the order of the kernels' codes
# The kernels follow this many dimensions that alternate between broadcast and not (csrc/plan.h).
_MAX_BROADCAST_NDIM = 7
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WHOLE_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def check_param(param: str, params: Sequence[str] = PARAMS) -> int:
    """The kernels' code of a parameterization.

    Raises:
        ValueError: `param` is not one of `params`.
    """
    if param not in params:
        more = ("softplus",) if params is PARAMS else ()
        names = ", ".join(map(repr, (*params, *more)))
        raise ValueError(f"param is {param!r}; want one of {names}")
    return params.index(param)


def check_bound(bound: Bound | Raised | None, param: str) -> Numbers | None:
    """A bound as the kernels take it.

    Raises:
        TypeError: `bound` is no `Bound`.
        ValueError: what it would apply to is not a log-variance.
    """
    if bound is None:
        return None
    if isinstance(bound, Raised):
        return bound.numbers
    if not isinstance(bound, Bound):
        raise TypeError(f"bound is a {type(bound).__name__}; want a fastvae.Bound or None")
    if param != "logvar":
        raise ValueError(f"bound is given and param is {param!r}; want param='logvar' with it")
    return bound.numbers


def check_reduction(reduction: str) -> None:
    """Raises ValueError if `reduction` is none of "mean", "sum" and "weighted_mean"."""
    if reduction not in ("mean", "sum", "weighted_mean"):
        raise ValueError(f"reduction is {reduction!r}; want 'mean', 'sum' or 'weighted_mean'")


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


def tensor_arguments(**arguments: TensorLike) -> tuple[list[Tensor], torch.Size]:
    """Floating-point tensors of one dtype and device, and the shape they broadcast to.

    Dtypes promote as PyTorch's do: the widest is taken. Integers and booleans count as float32.

    Python numbers become 0-d tensors of that dtype; with no tensor at all, they take PyTorch's
    default dtype. The tensors keep their own shapes: kernels broadcast while reading.

    Raises:
        TypeError: an argument is no tensor or number, is sparse or nested, or is of another dtype,
            such as complex.
        ValueError: the devices differ, or the shapes do not broadcast.
    """
    first, *others = arguments.values()
    if isinstance(first, Tensor):
        if not _is_dense(first):
            return _canonical(arguments)
        shape, dtype, device = first.shape, first.dtype, first.device
        alike = dtype in _DTYPES
        for value in others:
            alike = (
                alike
                and isinstance(value, Tensor)
                and _is_dense(value)
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
) -> tuple[Sequence[Tensor | None], torch.Size]:
    """The operands that are q and, unless it is N(0, I), p; and their common shape."""
    if prior_mu is None and prior_logvar is None:
        q, shape = tensor_arguments(mu=mu, logvar=logvar)
        return (*q, None, None), shape
    if prior_mu is None or prior_logvar is None:
        missing = "prior_mu" if prior_mu is None else "prior_logvar"
        raise ValueError(f"{missing} is None; want both prior_mu and prior_logvar, or neither")
    return tensor_arguments(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)


def log_prob_arguments(
    x: TensorLike, mean: TensorLike, **scale: TensorLike
) -> tuple[Sequence[Tensor | None], float, torch.Size]:
    """The operands of a log-likelihood, the number that stands for its scale, their shape.

    A number is not made a tensor, so that it is not rounded to a half type.
    """
    (value,) = scale.values()
    if (
        is_compiling()
        and isinstance(value, int | float)
        and isinstance(mean, Tensor)
        and mean.dtype in (torch.float32, torch.float64)
    ):
        # A number is a constant of the graph, and one that changes would have it compiled anew.
        value = torch.full((), value, dtype=mean.dtype, device=mean.device)
        scale = dict.fromkeys(scale, value)
    if isinstance(value, int | float):
        data, shape = tensor_arguments(x=x, mean=mean)
        return (*data, None), float(value), shape
    operands, shape = tensor_arguments(x=x, mean=mean, **scale)
    return operands, 0.0, shape


def weight_argument(
    weight: TensorLike | None, like: Tensor | None, shape: torch.Size
) -> Tensor | None:
    """What multiplies the values of operands `like` one of them, whose common shape is `shape`, in
    the type that these have: float64 for float64, else float32.

    Raises:
        TypeError: it is no tensor or number, or of another dtype, such as complex.
        ValueError: it is on another device, does not broadcast to `shape`, or wants a gradient.
    """
    if weight is None:
        return None
    assert like is not None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(weight, Real):
        return torch.full((), float(weight), dtype=dtype, device=like.device)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; want a tensor, a number or None")
    _check_dense("weight", weight)
    _computing_dtype("weight", weight.dtype)
    if weight.requires_grad:
        raise ValueError("weight requires a gradient, and gets none; want weight.detach()")
    if weight.device != like.device:
        raise ValueError(f"weight is on {weight.device}, the operands on {like.device}")
    missing = len(shape) - weight.dim()
    if missing < 0 or any(n not in (1, shape[missing + d]) for d, n in enumerate(weight.shape)):
        raise ValueError(
            f"weight has shape {list(weight.shape)}; want one that broadcasts to {list(shape)}"
        )
    return weight.to(dtype)


def _canonical(arguments: dict[str, TensorLike]) -> tuple[list[Tensor], torch.Size]:
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, t in given.items():
        _check_dense(name, t)
    default = "the default", torch.empty((), dtype=torch.get_default_dtype())
    first_name, first = next(iter(given.items()), default)
    dtypes = [_computing_dtype(name, value.dtype) for name, value in given.items()]
    widest = functools.reduce(torch.promote_types, dtypes or [first.dtype])
    tensors: list[Tensor] = []
    for name, value in arguments.items():
        if isinstance(value, Real):
            value = torch.full((), float(value), dtype=widest, device=first.device)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; want a tensor or a number")
        if value.device != first.device:
            raise ValueError(
                f"{name} is on {value.device}, {first_name} on {first.device}; want one device"
            )
        tensors.append(value.to(widest))
    try:
        shape = common_shape(tensors)
        if len(shape) > _MAX_BROADCAST_NDIM:
            tensors = [tensor.expand(shape).contiguous() for tensor in tensors]
        return tensors, shape
    except RuntimeError:
        shapes = ", ".join(
            f"{name} {list(tensor.shape)}" for name, tensor in zip(arguments, tensors, strict=True)
        )
        raise ValueError(f"shapes do not broadcast: {shapes}") from None


def common_shape(tensors: Sequence[Tensor | None]) -> torch.Size:
    """What all that are given broadcast to."""
    given = [t for t in tensors if t is not None]
    shape = given[0].shape
    if all(t.shape == shape for t in given):
        return shape
    return torch.broadcast_tensors(*given)[0].shape  # broadcast_shapes takes 25 us in torch 2.13


def _is_dense(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_nested


def _check_dense(name: str, t: Tensor) -> None:
    if not _is_dense(t):
        kind = "tensors (nested)" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name} is a tensor of {kind}; want a dense one")


def _computing_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    if dtype in _DTYPES:
        return dtype
    if dtype in _WHOLE_DTYPES:
        return torch.float32  # in which they are exact up to 2^24; half types end at 2^8 and 2^11
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
    raise TypeError(f"{name} has dtype {dtype}; want one of {names}, or integers as data")


def whole(name: str, value: object, least: int | None = None) -> int:
    """A whole number, Python's or another kind, such as NumPy's.

    Raises:
        TypeError: it is none.
        ValueError: it is less than `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; want a whole number")
    number = operator.index(cast(SupportsIndex, value))
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}; want at least {least}")
    return number


def as_shape(name: str, sizes: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one example, of which a number is the only size.

    Raises:
        TypeError: a size is no whole number.
        ValueError: it is not above 0.
    """
    shape = tuple(sizes) if isinstance(sizes, Sequence) else (sizes,)
    shape = tuple(whole(name, size) for size in shape)
    if any(size < 1 for size in shape):
        raise ValueError(f"{name} is {list(shape)}; want sizes above 0")
    return shape


def check_sample_shape(sample_shape: Sequence[int]) -> torch.Size:
    """`sample_shape` as a torch.Size."""
    try:
        size = torch.Size(sample_shape)
    except TypeError:
        raise TypeError(f"sample_shape is {sample_shape!r}; want a sequence of ints") from None
    if any(n < 0 for n in size):
        raise ValueError(f"sample_shape is {list(size)}; want no negative size")
    return size
