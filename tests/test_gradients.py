"""Backward: the fused gradients are those of the reference, whatever is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from accuracy import (
    assert_accurate,
    error,
    exact,
    gradients,
    normals,
    same_bits,
    tolerance,
    upstream_like,
)
from cases import (
    DTYPES,
    FORMS,
    LAYOUT_DTYPES,
    LAYOUT_SHAPE,
    LAYOUTS,
    NOT_DERIVATIVES,
    OPS,
    SEED,
    SHAPES,
    WIDTHS,
    Op,
    each_op_and_form,
    event_ndims,
    op_id,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastvae
from fastvae import reference

BROADCAST = [op for op in OPS if op.scale_shape is not tuple]
ALL = (*OPS, *NOT_DERIVATIVES)
each_op = pytest.mark.parametrize("op", ALL, ids=op_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_param = pytest.mark.parametrize("param", FORMS)
# Straight-through gradients and those of a path are not derivatives.
each_differentiable = each_op_and_form(
    forms=[param for param in FORMS if "straight_through" not in param]
)


@each_op_and_form(ALL)
@each_dtype
def test_gradients(op: Op, dtype: torch.dtype, param: str, device: torch.device) -> None:
    for shape in SHAPES:
        tensors = op.inputs(shape, dtype, param, device)
        for event_ndim in event_ndims(op, param, shape):
            grads, upstream = gradients(op, tensors, param, event_ndim=event_ndim)
            right = exact(op, tensors, param, event_ndim=event_ndim, upstream=upstream)
            assert_accurate(grads, right, dtype)


@each_op
@each_dtype
def test_gradients_of_every_width(op: Op, dtype: torch.dtype, device: torch.device) -> None:
    for width in WIDTHS:
        tensors = op.inputs((3, width), dtype, device=device, seed=width)
        grads, upstream = gradients(op, tensors)
        assert_accurate(grads, exact(op, tensors, upstream=upstream), dtype)


@each_op
@pytest.mark.parametrize("shape", [(2, 20000), (1, 100003), (3001, 5), (70, 8, 9, 10)], ids=str)
def test_gradients_of_long_rows_and_many_rows(
    op: Op, shape: tuple[int, ...], device: torch.device
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = op.inputs(shape, dtype, device=device)
        grads, upstream = gradients(op, tensors)
        assert_accurate(grads, exact(op, tensors, upstream=upstream), dtype)


@pytest.mark.parametrize("op", BROADCAST, ids=op_id)
@pytest.mark.parametrize("shape", [(60000, 3), (3000, 4, 15)], ids=str)
def test_long_sums_of_one_sign_stay_accurate(
    op: Op, shape: tuple[int, ...], device: torch.device
) -> None:
    """The same term over and over: rounding errors add up instead of cancelling."""
    x, *others = op.inputs(shape, device=device)
    fill = 0.5 if op.counts else 0
    tensors = [torch.full_like(x, 1.2345), *(torch.full_like(t, fill) for t in others)]
    grads, upstream = gradients(
        op, tensors, upstream=lambda ys: [torch.full_like(y, 1 / 3) for y in ys]
    )
    assert_accurate(grads, exact(op, tensors, upstream=upstream), torch.float32)


@each_op
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_gradients_of_nothing(op: Op, shape: tuple[int, ...], device: torch.device) -> None:
    tensors = op.inputs(shape, device=device)
    grads, _ = gradients(op, tensors)
    for grad, t in zip(grads, tensors, strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


@each_op
@pytest.mark.parametrize("dtype", LAYOUT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_layouts(
    op: Op, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    plain = op.inputs(LAYOUT_SHAPE, dtype, device=device)
    full = [k for k, t in enumerate(plain) if t.shape == LAYOUT_SHAPE]
    for chosen in (full, full[:1], full[-1:]):
        tensors = [layout(t) if k in chosen else t for k, t in enumerate(plain)]
        grads, upstream = gradients(op, tensors)
        assert_accurate(grads, exact(op, tensors, upstream=upstream), dtype)


# ---- What comes from upstream --------------------------------------------------------------------

UPSTREAM: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {
    "ones, expanded": lambda ys: [y.new_ones(()).expand(y.shape) for y in ys],
    "one a row, expanded": lambda ys: [
        torch.linspace(-1, 2, len(y), device=y.device, dtype=y.dtype)
        .view(-1, *(1 for _ in y.shape[1:]))
        .expand(y.shape)
        for y in ys
    ],
    "transposed": lambda ys: [g.mT.contiguous().mT for g in upstream_like(ys)],
    "odd storage offset": lambda ys: [LAYOUTS["odd storage offset"](g) for g in upstream_like(ys)],
    "every other column": lambda ys: [
        g.repeat_interleave(2, -1)[..., ::2] for g in upstream_like(ys)
    ],
    "negative and zero": lambda ys: [-g.relu() for g in upstream_like(ys)],
}


@each_op
@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_upstream_gradients(
    op: Op, upstream: Callable[[Sequence[Tensor]], list[Tensor]], device: torch.device
) -> None:
    for dtype in DTYPES:
        for event_ndim in (0, 1, 2):
            tensors = op.inputs((4, 5, 6, 7), dtype, device=device)
            grads, given = gradients(op, tensors, upstream=upstream, event_ndim=event_ndim)
            right = exact(op, tensors, event_ndim=event_ndim, upstream=given)
            assert_accurate(grads, right, dtype)


@pytest.mark.parametrize("op", [op for op in OPS if op.function == "rsample_kl"], ids=op_id)
@each_param
@pytest.mark.parametrize("used", [0, 1], ids=["z", "kl"])
def test_one_output_alone(op: Op, param: str, used: int, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in op.inputs((4, 9), param=param, device=device)]
    outputs = op(fastvae, leaves, param)
    upstream = upstream_like([y.detach() for y in outputs])
    upstream[1 - used].zero_()
    grads = torch.autograd.grad(outputs[used], leaves, upstream[used], allow_unused=True)
    if used == 0:
        assert all(g is None for g in grads[2:])  # z does not depend on the prior
    defined = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    assert_accurate(defined, exact(op, leaves, param, upstream=upstream), torch.float32)


class Blocked(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@each_op
def test_no_output_used(op: Op, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in op.inputs((4, 9), device=device)]
    outputs = op(fastvae, leaves)
    sum(Blocked.apply(y).sum() for y in outputs).backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves)


# ---- Who wants a gradient ------------------------------------------------------------------------


@each_op
def test_every_subset_of_inputs_that_need_a_gradient(op: Op, device: torch.device) -> None:
    tensors = op.inputs((3, 10), device=device)
    all_grads, _ = gradients(op, tensors)
    for needs in product((False, True), repeat=len(tensors)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        outputs = op(fastvae, leaves)
        assert all(same_bits(y, z) for y, z in zip(outputs, op(fastvae, tensors), strict=True))
        assert all(y.requires_grad == any(needs) for y in outputs)
        if not any(needs):
            continue
        torch.autograd.backward(outputs, upstream_like([y.detach() for y in outputs]))
        for leaf, need, grad in zip(leaves, needs, all_grads, strict=True):
            assert (leaf.grad is not None) == need
            assert not need or same_bits(leaf.grad, grad)


@pytest.mark.parametrize("module", [fastvae, reference], ids=["native", "reference"])
def test_same_tensors_twice(module: object, device: torch.device) -> None:
    mu = torch.randn(3, 8, device=device, requires_grad=True)
    logvar = torch.randn(3, 8, device=device, requires_grad=True)
    for create_graph in (False, True):
        kl = module.kl_divergence(mu, logvar, mu, logvar)
        assert torch.equal(kl, torch.zeros_like(kl))
        grads = torch.autograd.grad(kl.sum(), (mu, logvar), create_graph=create_graph)
        for g in grads:
            assert torch.equal(g, torch.zeros_like(g))


def test_one_tensor_as_both_arguments(device: torch.device) -> None:
    t = torch.randn(3, 8, device=device, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: fastvae.kl_divergence(t, t), [t])
    assert gradgradcheck(lambda t: fastvae.kl_divergence(t, t), [t])
    assert gradgradcheck(lambda t: fastvae.gaussian_log_prob(t, t * 2, t), [t])


@each_op
@each_dtype
def test_gradients_have_the_shape_and_dtype_of_their_inputs(
    op: Op, dtype: torch.dtype, device: torch.device
) -> None:
    tensors = op.inputs((6, 5, 4, 3), dtype, device=device)
    grads, _ = gradients(op, tensors)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in tensors]


# ---- Numerically ---------------------------------------------------------------------------------


def checked(op: Op, param: str) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *tensors: op(fastvae, tensors, param)


@each_differentiable
def test_gradcheck(op: Op, param: str, device: torch.device) -> None:
    for shape in ((2, 3), (1, 2, 2)):
        leaves = [t.requires_grad_() for t in op.inputs(shape, torch.float64, param, device)]
        assert gradcheck(checked(op, param), leaves)


@each_differentiable
def test_gradgradcheck(op: Op, param: str, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in op.inputs((2, 3), torch.float64, param, device)]
    assert gradgradcheck(checked(op, param), leaves)


@each_op_and_form(ALL)
def test_a_recorded_backward_gives_the_fused_gradients(
    op: Op, param: str, device: torch.device
) -> None:
    tensors = op.inputs((4, 9), torch.float32, param, device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = op(fastvae, leaves, param)
    upstream = upstream_like([y.detach() for y in outputs])
    recorded = torch.autograd.grad(outputs, leaves, upstream, create_graph=True)
    right = exact(op, tensors, param, upstream=upstream)
    assert_accurate(recorded, right, torch.float32)


# ---- What is kept for backward -------------------------------------------------------------------


@each_op
def test_only_inputs_and_seed_are_saved(op: Op, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in op.inputs((5, 40), device=device)]
    seed = torch.tensor(SEED, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op(fastvae, leaves, seed=seed)
    known = {t.data_ptr() for t in (*leaves, seed)}
    assert saved
    assert {t.data_ptr() for t in saved} <= known


# ---- The comparison itself -----------------------------------------------------------------------


@each_op
@each_dtype
def test_the_comparison_rejects_gradients_a_little_off(
    op: Op, dtype: torch.dtype, device: torch.device
) -> None:
    tensors = op.inputs((16, 64), dtype, device=device)
    grads, upstream = gradients(op, tensors)
    right = exact(op, tensors, upstream=upstream)
    for k in range(len(grads)):
        step = 4 * tolerance(dtype, dtype) * right.magnitudes[k]
        off = [g.double() + step if j == k else g for j, g in enumerate(grads)]
        with pytest.raises(AssertionError, match="is off by"):
            assert_accurate(off, right, dtype)


# ---- Where z is near the prior's mean ------------------------------------------------------------


@pytest.mark.parametrize("path_derivative", [False, True])
def test_a_log_ratio_whose_terms_cancel(path_derivative: bool, device: torch.device) -> None:
    """Within the bound that `cases._rounded_apart` derives, and no better one holds: relative to
    the results themselves, errors are thousands of times what is allowed elsewhere."""
    options = {"path_derivative": path_derivative}
    op = Op("log_ratio", "rsample_log_ratio", ("mu", "logvar", "prior_mu", "prior_logvar"), options)
    shape = (4000, 1)
    mu, logvar, p, nearness = (
        torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(device) for k in range(4)
    )
    z = 3 * mu + torch.exp(0.5 * logvar) * normals(*shape, seed=SEED, device=device)
    prior_mu = z * (1 + nearness * 10 ** (-8 * torch.rand(shape, device=device)))
    tensors = [3 * mu, logvar, prior_mu, 2 * p - 3]
    assert_accurate(op(fastvae, tensors, event_ndim=0), exact(op, tensors, event_ndim=0), mu.dtype)
    grads, upstream = gradients(op, tensors, event_ndim=0)
    right = exact(op, tensors, event_ndim=0, upstream=upstream)
    assert_accurate(grads, right, mu.dtype)
    assert error(grads[0], right.values[0], right.values[0].abs()) > 1e-5
