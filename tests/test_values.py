"""Every op gives what the reference gives in float64, for every dtype, shape and layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate, exact, same_bits, tolerance
from cases import (
    DTYPES,
    LAYOUT_DTYPES,
    LAYOUT_SHAPE,
    LAYOUTS,
    OPS,
    PARAMS,
    SHAPES,
    WIDTHS,
    Op,
    each_op_and_form,
    event_ndims,
    op_id,
)
from torch import Tensor
from torch.nn import functional as F

import fastvae
from fastvae import reference

HALF = (torch.bfloat16, torch.float16)
each_op = pytest.mark.parametrize("op", OPS, ids=op_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_op_and_form()
@each_dtype
def test_values(op: Op, dtype: torch.dtype, param: str, device: torch.device) -> None:
    for shape in SHAPES:
        tensors = op.inputs(shape, dtype, param, device)
        for event_ndim in event_ndims(op, param, shape):
            results = op(fastvae, tensors, param, event_ndim=event_ndim)
            right = exact(op, tensors, param, event_ndim=event_ndim)
            assert_accurate(results, right, dtype)


@each_op
@each_dtype
def test_every_width(op: Op, dtype: torch.dtype, device: torch.device) -> None:
    for width in WIDTHS:
        tensors = op.inputs((3, width), dtype, device=device, seed=width)
        assert_accurate(op(fastvae, tensors), exact(op, tensors), dtype)


@each_op
@pytest.mark.parametrize("shape", [(2, 20000), (1, 100003), (3001, 5), (70, 8, 9, 10)], ids=str)
def test_long_rows_and_many_rows(op: Op, shape: tuple[int, ...], device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = op.inputs(shape, dtype, device=device)
        assert_accurate(op(fastvae, tensors), exact(op, tensors), dtype)


@each_op
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (0, 0), (2, 0, 3), (0, 3, 2, 2)], ids=str)
def test_empty(op: Op, shape: tuple[int, ...], device: torch.device) -> None:
    for event_ndim in range(len(shape) + 1):
        tensors = op.inputs(shape, device=device)
        right = exact(op, tensors, event_ndim=event_ndim)
        assert_accurate(op(fastvae, tensors, event_ndim=event_ndim), right, torch.float32)


@each_op
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", LAYOUT_DTYPES, ids=str)
def test_layouts(
    op: Op, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    plain = op.inputs(LAYOUT_SHAPE, dtype, device=device)
    full = [k for k, t in enumerate(plain) if t.shape == LAYOUT_SHAPE]
    for chosen in (full, full[:1], full[-1:]):
        tensors = [layout(t) if k in chosen else t for k, t in enumerate(plain)]
        before = [t.clone() for t in tensors]
        results = op(fastvae, tensors)
        assert_accurate(results, exact(op, tensors), dtype)
        if op.draws:  # each element is computed alike, wherever it lies
            copies = [t.contiguous() for t in tensors]
            assert same_bits(results[0], op(fastvae, copies)[0])
        assert all(same_bits(t, copy) for t, copy in zip(tensors, before, strict=True))


@each_op
def test_result_shapes_and_dtypes(op: Op, device: torch.device) -> None:
    for dtype in DTYPES:
        for module in (fastvae, reference):
            results = op(module, op.inputs((2, 3, 5), dtype, device=device), event_ndim=1)
            if op.draws:
                assert results[0].shape == (*op.options.get("sample_shape", ()), 2, 3, 5)
                assert results[0].dtype == dtype
            if op.sums:
                assert results[-1].shape == (*op.options.get("sample_shape", ()), 2, 3)
                assert results[-1].dtype == (torch.float32 if dtype in HALF else dtype)


@each_op
def test_numbers_are_arguments(op: Op, device: torch.device) -> None:
    tensors = op.inputs((4, 6), device=device)
    for k in range(len(tensors)):
        for number in (1, 0.5, torch.tensor(0.5, device=device)):
            mixed = [number if j == k else t for j, t in enumerate(tensors)]
            full = [
                torch.full((4, 6), float(number), device=device) if j == k else t
                for j, t in enumerate(tensors)
            ]
            assert_accurate(op(fastvae, mixed), exact(op, full), torch.float32)


def test_channels_last_in_channels_last_out(device: torch.device) -> None:
    mu, logvar = (
        torch.randn(2, 8, 3, 5, device=device)
        .contiguous(memory_format=torch.channels_last)
        .chunk(2, dim=1)
    )
    z, _ = fastvae.rsample_kl(mu, logvar)
    assert z.is_contiguous(memory_format=torch.channels_last)


# ---- The comparison itself -----------------------------------------------------------------------


def eager(op: Op, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """What users write, in the dtype of the tensors, with the same noise."""
    dims = tuple(range(1, tensors[0].dim()))
    if "logits" in op.arguments:
        x, logits = tensors
        log_prob = -F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        if op.function == "continuous_bernoulli_log_prob":
            log_prob = log_prob + torch.log(logits / torch.tanh(logits / 2))
        return (log_prob.sum(dims),)
    if op.function == "laplace_log_prob":
        x, mean, *scale = tensors
        log_scale = scale[0] if scale else torch.tensor(op.options["log_scale"], dtype=x.dtype)
        return ((-(x - mean).abs() / log_scale.exp() - log_scale - 0.6931471805599453).sum(dims),)
    if op.function == "discretized_logistic_log_prob":
        return (_eager_discretized_logistic(*tensors, **op.options).sum(dims),)
    if op.counts:
        return (_eager_counts(*tensors).sum(dims),)
    if op.function == "gaussian_log_prob":
        x, mean, *scale = tensors
        logvar = scale[0] if scale else torch.tensor(op.options["logvar"], dtype=x.dtype)
        log_2pi = 1.8378770664093453
        terms = -0.5 * ((x - mean) ** 2 / logvar.exp() + logvar + log_2pi)
        return (terms.sum(dims),)
    mu, logvar, *prior = tensors
    eps = op_noise(op, mu) if op.draws else None
    if op.function == "rsample_log_ratio":
        z = mu + torch.exp(0.5 * logvar) * eps
        p = prior or (torch.zeros_like(mu), torch.zeros_like(mu))
        log_p, log_q = (
            (-0.5 * ((z - m) ** 2 / s.exp() + s)).sum([d - mu.dim() for d in dims])
            for m, s in (p, (mu, logvar))
        )
        return (z, log_p - log_q)
    if prior:
        prior_mu, prior_logvar = prior
        ratio = (logvar.exp() + (mu - prior_mu) ** 2) / prior_logvar.exp()
        kl = 0.5 * (prior_logvar - logvar + ratio - 1).sum(dims)
    else:
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(dims)
    if op.function == "kl_divergence":
        return (kl,)
    z = mu + torch.exp(0.5 * logvar) * eps
    return (z, kl) if op.sums else (z,)


def _eager_counts(
    x: Tensor, mean: Tensor, theta: Tensor | None = None, zero_logits: Tensor | None = None
) -> Tensor:
    if theta is None:
        return x * mean.log() - mean - torch.lgamma(x + 1)
    odds = torch.log(theta + mean)
    value = theta * (theta.log() - odds) + x * (mean.log() - odds)
    value = value + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return value if zero_logits is None else value - F.softplus(zero_logits)


def _eager_discretized_logistic(
    x: Tensor,
    mean: Tensor,
    log_scale: Tensor | float,
    bins: int = 256,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    half = (high - low) / (bins - 1) / 2
    scale = torch.exp(torch.as_tensor(log_scale, dtype=x.dtype))
    upper = torch.where(x > high - half, 1, torch.sigmoid((x - mean + half) / scale))
    lower = torch.where(x < low + half, 0, torch.sigmoid((x - mean - half) / scale))
    return torch.log(upper - lower)


def op_noise(op: Op, mu: Tensor) -> Tensor:
    zeros, ones = torch.zeros_like(mu), torch.ones_like(mu)
    return op(fastvae, [zeros, ones, *[zeros, ones][: len(op.arguments) - 2]], "std")[0]


@each_op
@each_dtype
def test_the_comparison_rejects_inputs_a_little_off(
    op: Op, dtype: torch.dtype, device: torch.device
) -> None:
    tensors = op.inputs((16, 64), dtype, device=device)
    right = exact(op, tensors)
    for k in range(len(tensors)):
        off = 20 * tolerance(dtype, dtype)
        moved = [t.double() + off if j == k else t for j, t in enumerate(tensors)]
        results = [
            y.to(z.dtype)
            for y, z in zip(exact(op, moved).values, op(fastvae, tensors), strict=True)
        ]
        with pytest.raises(AssertionError, match="is off by"):
            assert_accurate(results, right, dtype)


@each_op
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_comparison_rejects_eager_half_precision(op: Op, dtype: torch.dtype) -> None:
    tensors = op.inputs((16, 64), dtype)
    results = [y.to(z.dtype) for y, z in zip(eager(op, tensors), op(fastvae, tensors), strict=True)]
    with pytest.raises(AssertionError, match="is off by"):
        assert_accurate(results, exact(op, tensors), dtype)


# ---- KL near posterior collapse ------------------------------------------------------------------


def grid(device: torch.device) -> tuple[Tensor, Tensor]:
    steps = torch.tensor([sign * 10.0**-k for k in range(5) for sign in (1, -1)], device=device)
    mu, logvar = torch.meshgrid(steps, steps, indexing="ij")
    return mu.flatten(), logvar.flatten()


def test_kl_keeps_its_digits_near_collapse(device: torch.device) -> None:
    mu, logvar = grid(device)
    kl = fastvae.kl_divergence(mu, logvar, event_ndim=0)
    _, fused = fastvae.rsample_kl(mu, logvar, event_ndim=0)
    between = fastvae.kl_divergence(mu, logvar, 0.0, 0.0, event_ndim=0)
    right = reference.kl_divergence(mu.double(), logvar.double(), event_ndim=0)
    for result in (kl, fused, between):
        assert ((result - right).abs() / right).max() <= 1e-6


def test_kl_gradients_keep_their_digits_near_collapse(device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in grid(device)]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    right = torch.autograd.grad(reference.kl_divergence(*exact_leaves).sum(), exact_leaves)
    for kl in (
        fastvae.kl_divergence(*leaves),
        fastvae.rsample_kl(*leaves)[1],
        fastvae.kl_divergence(*leaves, 0.0, 0.0),
    ):
        for grad, value in zip(torch.autograd.grad(kl.sum(), leaves), right, strict=True):
            assert ((grad - value).abs() / value.abs()).max() <= 1e-6


def test_eager_kl_loses_its_digits_near_collapse(device: torch.device) -> None:
    mu, logvar = grid(device)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp())
    right = reference.kl_divergence(mu.double(), logvar.double(), event_ndim=0)
    assert ((kl - right).abs() / right).max() > 1e-6


@each_dtype
@pytest.mark.parametrize("param", PARAMS)
def test_kl_is_never_negative(dtype: torch.dtype, param: str, device: torch.device) -> None:
    centre = 0.0 if param in ("logvar", "log_std") else 1.0
    near = torch.linspace(-1, 1, 4097, dtype=torch.float64, device=device)
    s = torch.cat([centre + near * 10.0**-k for k in range(8)]).to(dtype)
    for result in (
        fastvae.kl_divergence(torch.zeros_like(s), s, param=param, event_ndim=0),
        fastvae.kl_divergence(torch.zeros_like(s), s, 0.0, s.flip(0), param=param, event_ndim=0),
    ):
        defined = result[~result.isnan()]  # a negative std has no logarithm
        assert (defined >= 0).all()
        assert len(defined) > len(s) // 4
