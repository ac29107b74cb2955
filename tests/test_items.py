"""Rows of logits over items: the multinomial and the categorical."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import seeded
from test_mixtures import assert_close, gradients
from torch import Tensor
from torch.nn import functional as F

import fastvae
from fastvae.ops.items import chosen_log_prob

pytestmark = pytest.mark.usefixtures("on_device")

SIZES = ((5, 1), (3, 20), (2, 16), (1, 511), (3, 513), (4, 3000), (2, 70001))
BOUNDS = {torch.float32: 3e-7, torch.float64: 1e-11}  # the latter is PyTorch's own rounding


def a_row(rows: int, items: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, ...]:
    """Counts, chosen items and logits."""
    generator = seeded(rows * items)
    logits = 3 * torch.randn(rows, items, generator=generator, dtype=torch.float64) + offset
    x = torch.poisson(torch.rand(rows, items, generator=generator)).to(dtype)
    x[:, 0] += 1  # no row of zeros
    return x, torch.randint(items, (rows,), generator=generator), logits.to(dtype)


def multinomial(x: Tensor, logits: Tensor) -> Tensor:
    return (x * F.log_softmax(logits, -1)).sum(-1)


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["near 0", "far from 0"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_values_and_gradients(dtype: torch.dtype, sizes: tuple[int, int], offset: float) -> None:
    x, chosen, logits = a_row(*sizes, dtype, offset)
    value, grads = gradients(fastvae.multinomial_log_prob, x, logits)
    right, right_grads = gradients(multinomial, x.double(), logits.double())
    bound = BOUNDS[dtype]
    if sizes[1] > 1:  # else all is 0
        assert_close(value, right, bound)
        for found, exact in zip(grads, right_grads, strict=True):
            assert_close(found, exact, bound)
    value, (grad,) = gradients(
        lambda t: fastvae.categorical_log_prob(chosen, t, event_ndim=0), logits
    )
    right, (right_grad,) = gradients(
        lambda t: -F.cross_entropy(t, chosen, reduction="none"), logits.double()
    )
    if sizes[1] > 1:
        assert_close(value, right, bound)
        assert_close(grad, right_grad, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, chosen, logits = a_row(4, 3000, dtype)
    value, grads = gradients(fastvae.multinomial_log_prob, x, logits)
    wide, wide_grads = gradients(fastvae.multinomial_log_prob, x.float(), logits.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wide, rtol=1e-6, atol=0)
    once_rounded = 0.51 * torch.finfo(dtype).eps
    for narrow, right in zip(grads, wide_grads, strict=True):
        assert narrow.dtype == dtype
        # Where x and what is expected of it nearly cancel, the rest is float32's rounding of them.
        torch.testing.assert_close(narrow.float(), right, rtol=once_rounded, atol=2**-21)
    value = chosen_log_prob(chosen, logits)
    torch.testing.assert_close(value, chosen_log_prob(chosen, logits.float()), rtol=1e-6, atol=0)


def test_shapes() -> None:
    x, chosen, logits = a_row(6, 20, torch.float32)
    whole = fastvae.multinomial_log_prob(x, logits)
    assert torch.equal(
        fastvae.multinomial_log_prob(x.view(2, 3, 20), logits.view(2, 3, 20)), whole.view(2, 3)
    )
    value, grads = gradients(fastvae.multinomial_log_prob, x[0], logits)
    right, right_grads = gradients(multinomial, x[0].double(), logits.double())
    assert_close(value, right, 3e-7)
    for found, exact in zip(grads, right_grads, strict=True):
        assert_close(found, exact, 6e-7)
    several = fastvae.categorical_log_prob(chosen, logits.expand(4, 6, 20), event_ndim=1)
    one = fastvae.categorical_log_prob(chosen, logits, event_ndim=1)
    assert torch.equal(several, one.expand(4))
    turned = logits.T.contiguous().T
    assert torch.equal(fastvae.multinomial_log_prob(x, turned), whole)
    assert fastvae.multinomial_log_prob(x[:0], logits[:0]).shape == (0,)


def test_soft_targets_are_the_cross_entropy() -> None:
    x, _, logits = a_row(6, 20, torch.float32)
    x = x / x.sum(-1, keepdim=True)
    found = fastvae.categorical_nll_loss(x, logits)
    torch.testing.assert_close(found, F.cross_entropy(logits, x))
    torch.testing.assert_close(fastvae.multinomial_nll_loss(x, logits), found)


def test_masked_items_count_nothing_if_they_never_were() -> None:
    x, chosen, logits = a_row(3, 20, torch.float32)
    x[:, 5:] = 0
    logits[:, 5:] = -math.inf
    value, (of_x, of_logits) = gradients(fastvae.multinomial_log_prob, x, logits)
    few, (_, few_grad) = gradients(fastvae.multinomial_log_prob, x[:, :5], logits[:, :5])
    torch.testing.assert_close(value, few)
    torch.testing.assert_close(of_logits[:, :5], few_grad)
    assert (of_logits[:, 5:] == 0).all()
    assert fastvae.multinomial_log_prob(torch.ones_like(x), logits)[0] == -math.inf
    assert chosen_log_prob(chosen * 0 + 7, logits)[0] == -math.inf
    assert of_x.shape == x.shape


def test_nan_comes_out() -> None:
    x, chosen, logits = a_row(3, 20, torch.float32)
    logits[1, 4] = math.nan
    assert fastvae.multinomial_log_prob(x, logits).isnan().tolist() == [False, True, False]
    assert chosen_log_prob(chosen, logits).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, c, t: fastvae.multinomial_log_prob(x[:, :3], t), ValueError, "broadcast"),
        (lambda x, c, t: fastvae.multinomial_log_prob(x[:, :0], t[:, :0]), ValueError, "items"),
        (lambda x, c, t: fastvae.categorical_log_prob(c.int(), t), TypeError, "int64"),
        (lambda x, c, t: fastvae.categorical_log_prob(c[:2], t), ValueError, "broadcast"),
        (lambda x, c, t: fastvae.multinomial_log_prob(x, t.cfloat()), TypeError, "dtype"),
    ],
)
def test_errors(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*a_row(3, 20, torch.float32))


@pytest.mark.parametrize("offset", [20, -20])
def test_items_that_do_not_exist(offset: int, device: torch.device) -> None:
    _, chosen, logits = a_row(3, 20, torch.float32)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"item|bounds"):
            fastvae.categorical_log_prob(chosen + offset, logits)
    else:  # an error would have to wait for the GPU
        assert fastvae.categorical_log_prob(chosen + offset, logits, event_ndim=0).isnan().all()


def test_second_derivatives_and_transforms() -> None:
    x, chosen, logits = a_row(3, 5, torch.float64)
    leaves = [x.requires_grad_(), logits.requires_grad_()]
    assert torch.autograd.gradgradcheck(fastvae.multinomial_log_prob, leaves)
    assert torch.autograd.gradgradcheck(lambda t: chosen_log_prob(chosen, t), leaves[1:])
    alone = torch.func.vmap(fastvae.multinomial_log_prob)(x.detach(), logits.detach())
    torch.testing.assert_close(alone, fastvae.multinomial_log_prob(x, logits).detach())


def test_compile() -> None:
    x, chosen, logits = a_row(3, 50, torch.float32)
    for f in (
        lambda t: fastvae.multinomial_log_prob(x, t),
        lambda t: fastvae.categorical_log_prob(chosen, t),
    ):
        value, grads = gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), logits)
        eager, eager_grads = gradients(f, logits)
        assert torch.equal(value, eager)
        assert torch.equal(grads[0], eager_grads[0])


def test_operators_are_registered_as_pytorch_wants() -> None:
    if not fastvae.backend.HAS_BINARY:
        pytest.skip("no binary")
    x, chosen, logits = a_row(3, 5, torch.float32)
    tests = ("test_schema", "test_faketensor")
    for name, first in (("multinomial_log_prob", x), ("chosen_log_prob", chosen)):
        forward = getattr(torch.ops.fastvae, name).default
        backward = getattr(torch.ops.fastvae, f"{name}_backward").default
        torch.library.opcheck(forward, (first, logits), test_utils=tests)
        torch.library.opcheck(backward, (torch.ones(3), first, logits, 2), test_utils=tests)
