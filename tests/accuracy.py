"""What is right, of the calls of cases.py, and how near a result must be to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import torch
from cases import DTYPES, SEED, Op, Shape
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae.ops.forms import log_sigma_of

# ---- What is right -------------------------------------------------------------------------------


def normals(
    *shape: int,
    seed: Tensor | int = 7,
    sample_shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The kernels' noise itself, which tests/test_noise.py holds to the reference's."""
    mu = torch.zeros(shape, dtype=dtype, device=device)
    return fastvae.rsample(mu, 1.0, param="std", seed=seed, sample_shape=sample_shape)


def kernel_noise(seed: Tensor, shape: Shape, *, sample_shape: Shape = ()) -> Tensor:
    """In place of `reference.noise`."""
    return normals(*shape, seed=seed, sample_shape=tuple(sample_shape), device=seed.device)


@dataclass(frozen=True)
class Exact:
    """float64 results and, for each element, the sum of the magnitudes of the terms it adds up."""

    values: tuple[Tensor, ...]
    magnitudes: tuple[Tensor, ...]


def exact(
    op: Op,
    tensors: Sequence[Tensor],
    param: str = "logvar",
    *,
    event_ndim: int | None = None,
    seed: Tensor | int = SEED,
    upstream: Sequence[Tensor] | None = None,
) -> Exact:
    """The reference in float64, with the kernels' noise: results, or gradients for `upstream`."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    leaves = [t.detach().double().expand(shape).requires_grad_() for t in tensors]
    with mock.patch("fastvae.ops.noise.noise", kernel_noise):
        outputs = op(reference, leaves, param, event_ndim=event_ndim, seed=seed)
        terms = op(reference, leaves, param, event_ndim=0, seed=seed)
    apart = None
    if op.function == "rsample_log_ratio":
        form = op.options.get("prior_param") or param.partition(",")[0]  # a bound is of q alone
        log_sigma_p = (
            log_sigma_of(leaves[3], form, op.options.get("min_std", 0.0)) if leaves[3:] else None
        )
        apart = _summed(_rounded_apart(leaves, terms[0], log_sigma_p), outputs[1])
    if upstream is None:
        values = tuple(y.detach() for y in outputs)
        magnitudes = [_summed(t.detach().abs(), y) for t, y in zip(terms, values, strict=True)]
        if apart is not None:
            magnitudes[1] = magnitudes[1] + apart.detach()
        return Exact(values, tuple(magnitudes))
    wanted = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    values = torch.autograd.grad(outputs, leaves, [g.double() for g in upstream], **wanted)
    from_each = [  # output and sample, the gradients of all leaves
        torch.autograd.grad(y, leaves, one.double(), **wanted)
        for y, g in zip(outputs, upstream, strict=True)
        for one in _one_by_one(g, len(op.options.get("sample_shape", ())))
    ]
    if apart is not None:
        one = upstream[1].double().abs()
        from_each.append(torch.autograd.grad(apart, leaves, one, **wanted))
    parts = list(zip(*from_each, strict=True))  # of each leaf
    return Exact(
        tuple(g.sum_to_size(t.shape) for t, g in zip(tensors, values, strict=True)),
        tuple(
            sum(g.abs() for g in p).sum_to_size(t.shape)
            for t, p in zip(tensors, parts, strict=True)
        ),
    )


def _summed(elements: Tensor, output: Tensor) -> Tensor:
    """Over an event, as an output is."""
    return elements.flatten(output.dim()).sum(-1) if output.dim() < elements.dim() else elements


def _rounded_apart(leaves: Sequence[Tensor], z: Tensor, log_sigma_p: Tensor | None) -> Tensor:
    """1/2 ((|mu - mu_p| + sigma |eps|) / sigma_p)^2: the 1/2 w^2 of a log-ratio if nothing
    cancelled in w = (z - mu_p) / sigma_p = ((mu - mu_p) + sigma eps) / sigma_p.

    With u = 2^-24, mu - mu_p is off by u |mu - mu_p|, sigma eps by 2 u sigma |eps| (the error of
    sigma), and their sum by u of itself, however small it is. So w is off by at most
    2 u (|mu - mu_p| + sigma |eps|) / sigma_p and a few u of itself, w^2 / 2 by |w| times that, and
    the gradient by mu, w / sigma_p, by that over sigma_p: where the two nearly cancel and sigma_p
    is small, by many times its own size. No code does better that is given mu, sigma and mu_p. The
    gradients of this expression are what those errors are relative to.
    """
    mu, _, *prior = leaves
    difference = (mu - prior[0] if prior else mu).abs() + (z - mu).abs()
    precision = 1.0 if log_sigma_p is None else torch.exp(-log_sigma_p)
    return 0.5 * (difference * precision).square()


def _one_by_one(t: Tensor, dims: int) -> Iterator[Tensor]:
    """`t` with all but one index of its first dimensions set to 0, for each index."""
    for index in product(*map(range, t.shape[:dims])):
        alone = torch.zeros_like(t)
        alone[index] = t[index]
        yield alone


def upstream_like(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Upstream gradients that are not ones."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
        for y in outputs
    ]


def gradients(
    op: Op,
    tensors: Sequence[Tensor],
    param: str = "logvar",
    *,
    upstream: Callable[[Sequence[Tensor]], Sequence[Tensor]] = upstream_like,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """The fused gradients of `tensors`, which keep their layout, and the upstream ones."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = op(fastvae, leaves, param, **options)
    grad_outputs = list(upstream([y.detach() for y in outputs]))
    return list(torch.autograd.grad(outputs, leaves, grad_outputs)), grad_outputs


# ---- How near ------------------------------------------------------------------------------------

# Of float32 arithmetic (half types are computed in it) and of float64 arithmetic. Both are stricter
# than the error that eager PyTorch makes, and small against it for half types. In float64 the right
# values are float64 sums themselves: of a hundred equal terms each is off by half of this.
PRECISION = {dtype: 2e-14 if dtype == torch.float64 else 1e-6 for dtype in DTYPES}


def tolerance(computed: torch.dtype, stored: torch.dtype) -> float:
    """The relative error allowed: of the arithmetic, and of one rounding to a narrower type."""
    is_half = stored in (torch.bfloat16, torch.float16)
    is_rounded = is_half or (computed, stored) == (torch.float64, torch.float32)
    return PRECISION[computed] + (torch.finfo(stored).eps / 2 if is_rounded else 0)


def error(result: Tensor, value: Tensor, magnitude: Tensor) -> float:
    """The largest error, relative to the magnitude of an element, the mean one or 1 (all inputs are
    around 1), whichever is greatest.

    Infinite where one of the two is not finite and the other is not the same.
    """
    assert result.shape == value.shape
    result, value = result.detach().double(), value.double()
    finite = magnitude[magnitude.isfinite()]
    floor = max(finite.mean().item(), 1) if finite.numel() else 1
    relative = (result - value).abs() / magnitude.clamp(min=floor)
    same = (result == value) | (result.isnan() & value.isnan())
    found = relative.nan_to_num(nan=torch.inf).masked_fill(same, 0)
    return found.max().item() if found.numel() else 0.0


def assert_accurate(results: Sequence[Tensor], right: Exact, computed: torch.dtype) -> None:
    for k, (y, value, magnitude) in enumerate(
        zip(results, right.values, right.magnitudes, strict=True)
    ):
        found, allowed = error(y, value, magnitude), tolerance(computed, y.dtype)
        assert found <= allowed, f"result {k} is off by {found:.2e}, allowed {allowed:.2e}"


def seeded(seed: int) -> torch.Generator:
    """For what is made where tensors are made by default (the fixture `on_device`)."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def placed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors that were made before a test began, where it computes."""
    there = torch.get_default_device()
    return {k: v.to(there) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, except that all NaNs are one."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    equal = (a == b) & (a.signbit() == b.signbit())
    return bool((equal | (a.isnan() & b.isnan())).all())
