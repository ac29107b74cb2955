"""Values that are not finite stay in their rows, and can be counted."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import gradients, same_bits
from cases import DTYPES, OPS, Op, op_id

import fastvae

ELEMENTWISE = [op for op in OPS if op.scale_shape is tuple]
each_op = pytest.mark.parametrize("op", ELEMENTWISE, ids=op_id)


@each_op
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e4, -1e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_stays_in_its_row(
    op: Op, poison: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Every other row, forward and backward, has the same bits as without it."""
    clean = op.inputs((6, 37), dtype, device=device)
    outputs = op(fastvae, clean)
    grads, _ = gradients(op, clean)
    for k in range(len(clean)):
        tensors = [t.clone() for t in clean]
        tensors[k][2, 11] = poison
        row = torch.arange(6, device=device) == 2
        for y, value in zip(op(fastvae, tensors), outputs, strict=True):
            d = y.shape.index(6)
            assert same_bits(y.movedim(d, 0)[~row], value.movedim(d, 0)[~row])
        poisoned, _ = gradients(op, tensors)
        for g, value in zip(poisoned, grads, strict=True):
            assert same_bits(g[~row], value[~row])


@each_op
def test_extremes_of_float16(op: Op, device: torch.device) -> None:
    """What float64 gives, rounded: infinite where that does not fit, and never something else."""
    extremes = [0.0, 6e-8, -6e-8, 6.1e-5, 1.0, -1.0, 11.0, 20.0, -20.0, 65504.0, -65504.0]
    grid = torch.tensor(extremes, dtype=torch.float16, device=device)
    pairs = torch.cartesian_prod(grid, grid)
    x, s = pairs[:, :1], pairs[:, 1:]
    if op.counts:
        x, s = x.abs().round(), s.abs().clamp(min=6e-8)
    zero = torch.full_like(x, 1 if op.counts else 0)
    scales = dict.fromkeys(("logvar", "log_scale", "logits", "rate", "theta"), s)
    tensors = {"mu": x, "x": x, **scales}
    given = [tensors.get(name, zero) for name in op.arguments]
    for y, value in zip(
        op(fastvae, given), op(fastvae.reference, [t.double() for t in given]), strict=True
    ):
        value = value.to(y.dtype)
        same = (y == value) | (y.isnan() & value.isnan())
        # A log-ratio is a difference of squares of noise, whose last digits are not the formulas'.
        floor = 1e-5 if op.function == "rsample_log_ratio" else 1e-10
        near = (y.double() - value.double()).abs() <= 2e-6 * value.double().abs() + floor
        if y.dtype == torch.float16:  # another rounding of the last place
            near = (y.double() - value.double()).abs() <= 1e-3 * value.double().abs() + 1e-7
        assert bool((same | (near & y.isfinite())).all())


# ---- Counting ------------------------------------------------------------------------------------


def test_counts_name_the_op(device: torch.device) -> None:
    mu = torch.zeros(4, 6, device=device)
    logvar = torch.zeros(4, 6, device=device, requires_grad=True)
    with fastvae.NonFinite() as found:
        z, kl = fastvae.rsample_kl(mu, logvar + 1000.0)  # e^1000 does not fit
        fastvae.gaussian_log_prob(mu, mu)
        kl.sum().backward()
    counts = found.counts()
    assert counts["gaussian_log_prob"] == (0, 0)
    assert counts["rsample_kl"] == (0, z.isinf().sum() + 4)
    assert counts["rsample_kl_backward"] == (0, 24)


def test_counts_add_up_and_end_with_the_block(device: torch.device) -> None:
    bad = torch.full((2, 3), math.nan, device=device)
    with fastvae.NonFinite() as found:
        for _ in range(3):
            fastvae.rsample(bad, bad)
    fastvae.rsample(bad, bad)
    assert found.counts() == {"rsample": (3 * 12, 3 * 6)}


def test_counting_changes_no_result(device: torch.device) -> None:
    for op in OPS:
        tensors = op.inputs((4, 6), device=device)
        right = op(fastvae, tensors)
        with fastvae.NonFinite():
            found = op(fastvae, tensors)
        assert all(same_bits(y, value) for y, value in zip(found, right, strict=True))


# ---- Deterministic mode --------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=op_id)
def test_deterministic_mode_is_honoured_and_changes_nothing(op: Op, device: torch.device) -> None:
    tensors = op.inputs((70, 300), device=device)
    right = [*op(fastvae, tensors), *gradients(op, tensors)[0]]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = [*op(fastvae, tensors), *gradients(op, tensors)[0]]
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(same_bits(y, value) for y, value in zip(found, right, strict=True))
