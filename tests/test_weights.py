"""Values that are weighted before they are summed, and what weighs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import assert_accurate, error, exact, gradients, same_bits
from cases import (
    DTYPES,
    LAYOUT_DTYPES,
    LAYOUT_SHAPE,
    LAYOUTS,
    NOT_DERIVATIVES,
    SEED,
    WEIGHTED,
    Op,
    each_op_and_form,
    event_ndims,
    op_id,
    weights,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastvae
from fastvae import reference

each_op = pytest.mark.parametrize("op", WEIGHTED, ids=op_id)
each_loss = pytest.mark.parametrize(
    "op", [op for op in WEIGHTED if op.function.endswith("log_prob")], ids=op_id
)
SHAPE = (5, 3, 7)


def test_the_table_has_every_op_that_sums() -> None:
    functions = {op.function for op in (*WEIGHTED, *NOT_DERIVATIVES)}
    assert functions == {
        name
        for name, op in fastvae.ops.op.OPS.items()
        if op._kernels is not None and op._kernels.schema.weighs
    }


@each_op_and_form(WEIGHTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(op: Op, dtype: torch.dtype, param: str, device: torch.device) -> None:
    for shape in ((), (5,), (3, 1), (4, 20), (2, 3, 5), (3, 70)):
        tensors = op.inputs(shape, dtype, param, device)
        for event_ndim in event_ndims(op, param, shape):
            results = op(fastvae, tensors, param, event_ndim=event_ndim)
            assert_accurate(results, exact(op, tensors, param, event_ndim=event_ndim), dtype)
            grads, upstream = gradients(op, tensors, param, event_ndim=event_ndim)
            right = exact(op, tensors, param, event_ndim=event_ndim, upstream=upstream)
            assert_accurate(grads, right, dtype)


@each_op
def test_what_is_tested_depends_on_weights(op: Op) -> None:
    tensors = op.inputs((4, 20))
    plain = replace(op, weighted=False)
    with pytest.raises(AssertionError, match="is off by"):
        assert_accurate(op(fastvae, tensors), exact(plain, tensors), torch.float32)


@each_op
@pytest.mark.parametrize("shape", [(2, 20000), (3001, 5), (70, 8, 9, 10), (0, 4), (4, 0)], ids=str)
def test_long_rows_many_rows_and_none(op: Op, shape: tuple[int, ...], device: torch.device) -> None:
    tensors = op.inputs(shape, device=device)
    assert_accurate(op(fastvae, tensors), exact(op, tensors), torch.float32)
    grads, upstream = gradients(op, tensors)
    assert_accurate(grads, exact(op, tensors, upstream=upstream), torch.float32)


@each_op
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", LAYOUT_DTYPES, ids=str)
def test_layouts(
    op: Op, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    tensors = [
        layout(t) if t.shape == LAYOUT_SHAPE else t
        for t in op.inputs(LAYOUT_SHAPE, dtype, device=device)
    ]
    assert_accurate(op(fastvae, tensors), exact(op, tensors), dtype)
    grads, upstream = gradients(op, tensors)
    assert_accurate(grads, exact(op, tensors, upstream=upstream), dtype)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_weights(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    mu, logvar = torch.randn(2, *LAYOUT_SHAPE, device=device).unbind()
    weight = layout(torch.randn(LAYOUT_SHAPE, device=device))
    found = fastvae.kl_divergence(mu, logvar, weight=weight)
    right = reference.kl_divergence(mu.double(), logvar.double(), weight=weight.double())
    torch.testing.assert_close(found, right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [2, 0.25, True, (), (7,), (3, 1), (5, 1, 1)], ids=str)
def test_what_broadcasts(weight: float | tuple[int, ...], device: torch.device) -> None:
    given = torch.rand(weight, device=device) if isinstance(weight, tuple) else weight
    mu, logvar = torch.randn(2, *SHAPE, device=device).unbind()
    elements = fastvae.kl_divergence(mu, logvar, event_ndim=0)
    torch.testing.assert_close(
        fastvae.kl_divergence(mu, logvar, weight=given), (elements * given).sum((1, 2))
    )


@each_op
def test_a_mask_of_booleans_is_one_of_numbers(op: Op, device: torch.device) -> None:
    tensors = op.inputs(SHAPE, device=device)
    options = {"seed": SEED} if op.draws else {}
    function, mask = getattr(fastvae, op.function), weights(SHAPE, device) > 0
    results = [function(*tensors, **op.options, **options, weight=w) for w in (mask, mask.float())]
    assert same_bits(*(r[-1] if isinstance(r, tuple) else r for r in results))


# ---- What weighs nothing -------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e38], ids=str)
@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
def test_what_weighs_nothing_may_hold_anything(
    op: Op, bad: float, backend: Any, device: torch.device
) -> None:
    """Neither values nor gradients know of it; those of other elements are what they were."""
    op = replace(op, scale_shape=tuple)
    shape = (4, 3, 20)
    weight = weights(shape, device).expand(shape)
    tensors = op.inputs(shape, device=device)
    dirty = [t.masked_fill(weight == 0, bad) for t in tensors]
    if op.draws and backend != "native" and bad == 1e38:
        pytest.skip("a finite q whose sigma overflows: z is infinite, and so is its gradient")
    found = []
    for inputs in (tensors, dirty):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with fastvae.use_backend(backend):
            value = op(fastvae, leaves)[-1]
        found.append((value, *torch.autograd.grad(value.sum(), leaves)))
    for clean, of_dirty in zip(*found, strict=True):
        assert of_dirty.isfinite().all()
        assert same_bits(clean.detach() + 0, of_dirty.detach() + 0)


def test_a_sample_that_does_not_count_has_its_gradient(device: torch.device) -> None:
    mu, logvar = torch.randn(2, 4, 9, device=device).unbind()
    mu.requires_grad_()
    z, kl = fastvae.rsample_kl(mu, logvar, weight=0, seed=3)
    (3 * z.sum() + kl.sum()).backward()
    assert torch.equal(mu.grad, torch.full_like(mu, 3))
    assert torch.equal(kl, torch.zeros_like(kl))


# ---- Losses --------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "weighted_mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(op: Op, reduction: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = (6, 3, 8)
    weight = weights(shape, device).abs()
    tensors = op.inputs(shape, dtype, device=device)
    loss = getattr(fastvae, op.function.replace("log_prob", "nll_loss"))
    log_prob = getattr(reference, op.function)
    leaves = [t.clone().requires_grad_() for t in tensors]
    exact_leaves = [t.double().requires_grad_() for t in tensors]
    found = loss(*leaves, **op.options, weight=weight, reduction=reduction)
    values = log_prob(*exact_leaves, **op.options, weight=weight.double())
    rows = {"mean": 6, "sum": 1, "weighted_mean": 3 * weight.sum().item()}[reduction]
    right = -values.sum() / rows
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)
    for grad, want in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(right, exact_leaves), strict=True
    ):
        torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=tolerance)


def test_a_weighted_mean_without_weights_is_that_of_elements(device: torch.device) -> None:
    x, mean = torch.randn(2, 6, 5, device=device).unbind()
    for module in (fastvae, reference):
        found = module.gaussian_nll_loss(x, mean, reduction="weighted_mean")
        torch.testing.assert_close(found, -module.gaussian_log_prob(x, mean, event_ndim=0).mean())


# ---- What else is made of an op ------------------------------------------------------------------


@each_op
def test_derivatives(op: Op, device: torch.device) -> None:
    tensors = [t.requires_grad_() for t in op.inputs((3, 6), torch.float64, device=device)]
    assert gradcheck(lambda *ts: op(fastvae, ts), tensors)
    assert gradgradcheck(lambda *ts: op(fastvae, ts), tensors)


@each_op
def test_vmap_over_weights(op: Op, device: torch.device) -> None:
    if op.draws:
        pytest.skip("vmap draws one noise for each")
    tensors, weight = op.inputs(SHAPE, device=device), torch.rand(4, *SHAPE, device=device)
    function = getattr(fastvae, op.function)

    def one(w: Tensor) -> Tensor:
        return function(*tensors, **op.options, weight=w)

    right = torch.stack([one(w) for w in weight])
    torch.testing.assert_close(torch.func.vmap(one)(weight), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", LAYOUT_DTYPES, ids=str)
def test_packed_gaussians(dtype: torch.dtype, device: torch.device) -> None:
    params = torch.randn(4, 6, 5, device=device, dtype=dtype).requires_grad_()
    weight = weights((4, 3, 5), device)
    q = fastvae.DiagonalGaussian.from_params(params)
    mu, logvar = params.chunk(2, 1)
    for packed, plain in (
        (q.kl(weight=weight), fastvae.kl_divergence(mu, logvar, weight=weight)),
        (
            q.rsample_kl(weight=weight, seed=3)[1],
            fastvae.rsample_kl(mu, logvar, weight=weight, seed=3)[1],
        ),
        (
            q.rsample_log_ratio(weight=weight, seed=3)[1],
            fastvae.rsample_log_ratio(mu, logvar, weight=weight, seed=3)[1],
        ),
    ):
        assert same_bits(packed, plain)
        grads = [
            torch.autograd.grad(y.sum(), params, retain_graph=True)[0] for y in (packed, plain)
        ]
        assert same_bits(*grads)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_op
def test_other_backends(op: Op, dtype: torch.dtype, backend: Any) -> None:
    tensors = op.inputs(SHAPE, dtype)
    with fastvae.use_backend(backend):
        found = op(fastvae, tensors)[-1]
        grads, upstream = gradients(op, tensors)
    torch.testing.assert_close(found, op(fastvae, tensors)[-1], rtol=1e-5, atol=2e-5)
    right = exact(op, tensors, upstream=upstream)
    for grad, value, size in zip(grads, right.values, right.magnitudes, strict=True):
        rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        assert error(grad, value, size) <= 2e-5 + rounding


def test_compiled_in_one_graph() -> None:
    mu, logvar = torch.randn(2, 4, 9).requires_grad_().unbind()
    mask = torch.rand(4, 9) > 0.5

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(mu: Tensor, logvar: Tensor) -> Tensor:
        z, kl = fastvae.rsample_kl(mu, logvar, weight=mask, seed=3)
        return kl.sum() + z.sum() + fastvae.gaussian_nll_loss(z, mu, weight=mask)

    z, kl = fastvae.rsample_kl(mu, logvar, weight=mask, seed=3)
    right = kl.sum() + z.sum() + fastvae.gaussian_nll_loss(z, mu, weight=mask)
    torch.testing.assert_close(step(mu, logvar), right)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ("no", TypeError, "weight is a str; want a tensor, a number or None"),
        (torch.ones(4, dtype=torch.complex64), TypeError, "weight has dtype torch.complex64"),
        (
            torch.ones(4),
            ValueError,
            r"weight has shape \[4\]; want one that broadcasts to \[5, 3, 7",
        ),
        (torch.ones(2, 5, 3, 7), ValueError, r"weight has shape \[2, 5, 3, 7\]; want one"),
        (torch.ones(7, requires_grad=True), ValueError, "weight requires a gradient"),
        (torch.ones(7, device="meta"), ValueError, "weight is on meta, the operands on cpu"),
    ],
    ids=str,
)
def test_rejects(weight: Any, error: type[Exception], message: str) -> None:
    for module in (fastvae, reference):
        with pytest.raises(error, match=message):
            module.kl_divergence(torch.zeros(SHAPE), torch.zeros(SHAPE), weight=weight)


def test_kernels_reject() -> None:
    mu, settings = torch.zeros(SHAPE), (0, -1, 2, None)
    kernel = torch.ops.fastvae.kl_divergence
    with pytest.raises(RuntimeError, match=r"weight of shape \[4\] does not broadcast"):
        kernel(mu, mu, None, None, torch.ones(4), *settings)
    with pytest.raises(RuntimeError, match="weight has another dtype"):
        kernel(mu, mu, None, None, torch.ones(7, dtype=torch.float64), *settings)
