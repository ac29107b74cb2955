"""The ops of `torch.ops.fastvae` without data: the shapes, strides and dtypes that they return.

`torch.compile`, `torch.export` and meta tensors ask for them. What `Layout` says is what
`csrc/call.cpp` allocates; `torch.library.opcheck` holds the two together in the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend  # noqa: F401  loads the binary, which defines the ops

__all__ = ["PIXEL_LOG_PROBS"]


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
        dtype = torch.float64 if self.first.dtype == torch.float64 else torch.float32
        rows = len(self.shape) - self.event_ndim
        return self._empty(self.shape[:rows], dtype, self.event_ndim, rows=self.event_ndim > 0)

    def gradients(self, count: int, needs: int) -> tuple[Tensor | None, ...]:
        """Of the first `count` inputs; None for what is not wanted."""
        padded = [*self.inputs, *(None,) * count][:count]
        return tuple(
            self._empty(t.shape, t.dtype) if t is not None and needs >> k & 1 else None
            for k, t in enumerate(padded)
        )


def _gaussians(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    packed_dim: int,
    event_ndim: int | None = None,
    sample_shape: Sequence[int] = (),
) -> Layout:
    inputs = (mu, logvar, prior_mu, prior_logvar)
    return Layout(
        inputs,
        packed=[k for k in (0, 2) if inputs[k] is not None and inputs[k + 1] is None],
        packed_dim=packed_dim,
        event_ndim=event_ndim,
        sample_shape=sample_shape,
    )


Maybe = Tensor | None
MaybeBound = list[float] | None
Gradients = tuple[Maybe, ...]


def rsample(
    mu: Tensor,
    logvar: Maybe,
    seed: Tensor,
    param: int,
    packed_dim: int,
    sample_shape: list[int],
    bound: MaybeBound = None,
) -> Tensor:
    return _gaussians(mu, logvar, packed_dim=packed_dim, sample_shape=sample_shape).output()


def rsample_backward(
    grad_z: Tensor,
    mu: Tensor,
    logvar: Maybe,
    seed: Tensor,
    param: int,
    packed_dim: int,
    sample_shape: list[int],
    needs: int,
    bound: MaybeBound = None,
) -> Gradients:
    layout = _gaussians(mu, logvar, packed_dim=packed_dim, sample_shape=sample_shape)
    return layout.gradients(2, needs)


def kl_divergence(
    mu: Tensor,
    logvar: Maybe,
    prior_mu: Maybe,
    prior_logvar: Maybe,
    param: int,
    packed_dim: int,
    event_ndim: int,
    bound: MaybeBound = None,
) -> Tensor:
    return _gaussians(
        mu, logvar, prior_mu, prior_logvar, packed_dim=packed_dim, event_ndim=event_ndim
    ).value()


def kl_divergence_backward(
    grad_kl: Tensor,
    mu: Tensor,
    logvar: Maybe,
    prior_mu: Maybe,
    prior_logvar: Maybe,
    param: int,
    packed_dim: int,
    event_ndim: int,
    needs: int,
    bound: MaybeBound = None,
) -> Gradients:
    return _gaussians(
        mu, logvar, prior_mu, prior_logvar, packed_dim=packed_dim, event_ndim=event_ndim
    ).gradients(4, needs)


def rsample_kl(
    mu: Tensor,
    logvar: Maybe,
    prior_mu: Maybe,
    prior_logvar: Maybe,
    seed: Tensor,
    param: int,
    packed_dim: int,
    event_ndim: int,
    bound: MaybeBound = None,
) -> tuple[Tensor, Tensor]:
    layout = _gaussians(
        mu, logvar, prior_mu, prior_logvar, packed_dim=packed_dim, event_ndim=event_ndim
    )
    return layout.output(), layout.value()


def rsample_kl_backward(
    grad_z: Tensor,
    grad_kl: Tensor,
    mu: Tensor,
    logvar: Maybe,
    prior_mu: Maybe,
    prior_logvar: Maybe,
    seed: Tensor,
    param: int,
    packed_dim: int,
    event_ndim: int,
    needs: int,
    bound: MaybeBound = None,
) -> Gradients:
    return kl_divergence_backward(
        grad_kl, mu, logvar, prior_mu, prior_logvar, param, packed_dim, event_ndim, needs
    )


def rsample_log_ratio(
    mu: Tensor,
    logvar: Maybe,
    prior_mu: Maybe,
    prior_logvar: Maybe,
    seed: Tensor,
    param: int,
    packed_dim: int,
    event_ndim: int,
    sample_shape: list[int],
    path_derivative: bool,
    bound: MaybeBound = None,
) -> tuple[Tensor, Tensor]:
    layout = _gaussians(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        packed_dim=packed_dim,
        event_ndim=event_ndim,
        sample_shape=sample_shape,
    )
    return layout.output(), layout.value()


def rsample_log_ratio_backward(
    grad_z: Tensor,
    grad_log_ratio: Tensor,
    mu: Tensor,
    logvar: Maybe,
    prior_mu: Maybe,
    prior_logvar: Maybe,
    seed: Tensor,
    param: int,
    packed_dim: int,
    event_ndim: int,
    sample_shape: list[int],
    path_derivative: bool,
    needs: int,
    bound: MaybeBound = None,
) -> Gradients:
    return _gaussians(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        packed_dim=packed_dim,
        event_ndim=event_ndim,
        sample_shape=sample_shape,
    ).gradients(4, needs)


def gaussian_log_prob(
    x: Tensor,
    mean: Tensor,
    logvar: Maybe,
    scale: float,
    param: int,
    event_ndim: int,
    bound: MaybeBound = None,
) -> Tensor:
    return Layout((x, mean, logvar), event_ndim=event_ndim).value()


def gaussian_log_prob_backward(
    grad_log_prob: Tensor,
    x: Tensor,
    mean: Tensor,
    logvar: Maybe,
    scale: float,
    param: int,
    event_ndim: int,
    needs: int,
    bound: MaybeBound = None,
) -> Gradients:
    return Layout((x, mean, logvar), event_ndim=event_ndim).gradients(3, needs)


def gaussian_log_prob_with_grad(
    grad_log_prob: Tensor,
    x: Tensor,
    mean: Tensor,
    logvar: Maybe,
    scale: float,
    param: int,
    event_ndim: int,
    needs: int,
    bound: MaybeBound = None,
) -> Gradients:
    layout = Layout((x, mean, logvar), event_ndim=event_ndim)
    return layout.value(), *layout.gradients(3, needs)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    return None


# How many tensors the arguments of a log-probability of pixels begin with. `event_ndim` is the last
# of the arguments; backward has the upstream gradient before and `needs` behind them.
PIXEL_LOG_PROBS = {
    "bernoulli_log_prob": 2,
    "continuous_bernoulli_log_prob": 2,
    "laplace_log_prob": 3,
    "discretized_logistic_log_prob": 3,
}


def _log_prob(count: int, *arguments: Any) -> Tensor:
    return Layout(arguments[:count], event_ndim=arguments[-1]).value()


def _log_prob_backward(count: int, grad_log_prob: Tensor, *arguments: Any) -> Gradients:
    *operands, event_ndim, needs = arguments
    return Layout(operands[:count], event_ndim=event_ndim).gradients(count, needs)


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


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        rsample,
        rsample_backward,
        kl_divergence,
        kl_divergence_backward,
        rsample_kl,
        rsample_kl_backward,
        rsample_log_ratio,
        rsample_log_ratio_backward,
        gaussian_log_prob,
        gaussian_log_prob_backward,
        gaussian_log_prob_with_grad,
        scale_,
    )
}
for _name, _count in PIXEL_LOG_PROBS.items():
    _FUNCTIONS[_name] = functools.partial(_log_prob, _count)
    _FUNCTIONS[f"{_name}_backward"] = functools.partial(_log_prob_backward, _count)

for _name, _function in _FUNCTIONS.items():
    if hasattr(torch.ops.fastvae, _name):  # absent without a binary
        torch.library.register_fake(f"fastvae::{_name}", _on_one_device(_name, _function))
