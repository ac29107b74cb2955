"""Ops of rows, groups and pixels where there are no kernels, by formulas of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import fastvae
from fastvae import reference
from fastvae.ops.op import OPS


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with fastvae.use_backend("eager"):
        yield


def mixture(m: Any, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    return m.mixture_log_prob(z, mu, logvar, log_weights)


def equal_mixture(m: Any, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return m.mixture_log_prob(z, mu, logvar)


def pairwise(m: Any, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return m.pairwise_log_prob(z, mu, logvar.exp(), param="var")


def aggregate(m: Any, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    options: dict[str, Any] = {"dataset_size": 50, "param": "log_std"}
    return sum(m.aggregate_log_prob(z, mu, 0.5 * logvar, **options))  # type: ignore[return-value]


def multinomial(m: Any, logits: Tensor) -> Tensor:
    return m.multinomial_log_prob(torch.arange(logits.numel()).reshape(logits.shape) % 3, logits)


def soft_targets(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return m.multinomial_log_prob(x.abs(), logits)


def categorical_kl(m: Any, logits: Tensor, prior: Tensor) -> Tensor:
    return m.balanced_categorical_kl_divergence(logits, prior, balance=0.7)


def mixed_categorical_kl(m: Any, logits: Tensor, prior: Tensor) -> Tensor:
    options = {"uniform_mix": 0.01, "free_nats": 0.5}
    return m.balanced_categorical_kl_divergence(logits, prior, **options)


def colours(m: Any, parameters: Tensor) -> Tensor:
    x = torch.arange(3 * 5 * 4).reshape(3, 5, 4) % 256 * 17 % 256 / 127.5 - 1
    x = x.to(parameters.dtype)[None]
    return m.colour_mixture_log_prob(x, parameters[None], components=2).sum()


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "mixture_log_prob": (mixture, [(6, 5), (4, 5), (4, 5), (4,)]),
    "mixture_log_prob, equal": (equal_mixture, [(2, 3, 5), (4, 5), (4, 5)]),
    "pairwise_log_prob": (pairwise, [(6, 5), (4, 5), (4, 5)]),
    "aggregate_log_prob": (aggregate, [(6, 5), (6, 5), (6, 5)]),
    "multinomial_log_prob": (multinomial, [(4, 7)]),
    "multinomial_log_prob, soft": (soft_targets, [(7,), (4, 7)]),
    "balanced_categorical_kl_divergence": (categorical_kl, [(4, 3, 7), (3, 7)]),
    "balanced_categorical_kl_divergence, mixed": (mixed_categorical_kl, [(4, 3, 7), (4, 3, 7)]),
    "colour_mixture_log_prob": (colours, [(20, 5, 4)]),
}
each_case = pytest.mark.parametrize(("call", "shapes"), CASES.values(), ids=CASES)


def leaves_of(shapes: list[tuple[int, ...]], scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(s, dtype=torch.float64)).requires_grad_() for s in shapes]


def test_the_table_has_every_op_with_a_formula_of_its_own() -> None:
    tested = {name.partition(",")[0] for name in CASES} - {"aggregate_log_prob"}
    assert tested == {
        name
        for name, op in OPS.items()
        if op.whole and op._eager.function is not op._definition.function
    }


@each_case
@pytest.mark.parametrize("scale", [1.0, 1e-2, 10.0])
def test_values_and_gradients(
    call: Callable[..., Tensor], shapes: list[tuple[int, ...]], scale: float
) -> None:
    exact = leaves_of(shapes, scale)
    right = call(reference, *exact)
    upstream = torch.randn_like(right)
    slopes = torch.autograd.grad(right, exact, upstream)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-5)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in exact]
        value = call(fastvae, *leaves)
        assert value.dtype == dtype
        size = max(1.0, right.abs().max().item())
        assert_close(value.double(), right, rtol=tolerance, atol=tolerance * size)
        for found, slope in zip(
            torch.autograd.grad(value, leaves, upstream.to(dtype)), slopes, strict=True
        ):
            size = slope.abs().max().item()
            assert_close(found.double(), slope, rtol=tolerance, atol=tolerance * size)


@each_case
def test_derivatives(call: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    leaves = leaves_of(shapes)
    if call is categorical_kl or call is mixed_categorical_kl:  # no derivative of its value
        value = call(fastvae, *leaves).sum()
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        found = torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)
        value = call(reference, *leaves).sum()
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        assert_close(found, torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves))
        return
    assert gradcheck(lambda *t: call(fastvae, *t), leaves, check_batched_grad=True)
    assert gradgradcheck(lambda *t: call(fastvae, *t), leaves)


def test_half_types_are_computed_in_float32() -> None:
    logits, prior = (torch.randn(4, 3, 7, dtype=torch.bfloat16) for _ in range(2))
    found = categorical_kl(fastvae, logits, prior)
    assert found.dtype == torch.float32
    assert_close(found, categorical_kl(reference, logits.float(), prior.float()))


# ---- What has a probability of 0 -----------------------------------------------------------------


def test_items_that_cannot_be() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    for x, impossible in (([2.0, 0.0, 1.0], False), ([0.0, 1.0, 1.0], True)):
        value = fastvae.multinomial_log_prob(torch.tensor([x]), logits)
        right = reference.multinomial_log_prob(torch.tensor([x]), logits)
        assert_close(value, right)
        assert math.isinf(value.item()) == impossible
    (slope,) = torch.autograd.grad(
        fastvae.multinomial_log_prob(torch.tensor([[2.0, 0.0, 1.0]]), logits), logits
    )
    assert slope.isfinite().all()
    assert math.isnan(fastvae.multinomial_log_prob(torch.ones(1, 3), logits * torch.nan).item())


@pytest.mark.parametrize("uniform_mix", [0.0, 0.01])
def test_classes_that_cannot_be(uniform_mix: float) -> None:
    free, masked = torch.randn(5), torch.tensor([0.0, 1.0, -1.0, -torch.inf, 0.5])
    for q, p in ((free, masked), (masked, free), (masked, masked)):
        leaves = [t.clone().requires_grad_() for t in (q, p)]
        kl, right = (
            m.balanced_categorical_kl_divergence(*leaves, uniform_mix=uniform_mix)
            for m in (fastvae, reference)
        )
        assert_close(kl, right, rtol=1e-5, atol=1e-6)
        assert kl.isinf() == (uniform_mix == 0 and q is free)
        if kl.isfinite():
            assert_close(*(torch.autograd.grad(y, leaves) for y in (kl, right)))


def test_a_kl_near_0_keeps_its_digits() -> None:
    """Where sum q (ln q - ln p) of float32 numbers has none."""
    logits = torch.randn(200, 32)
    near = logits + 1e-4 * torch.randn(200, 32)
    kl = fastvae.balanced_categorical_kl_divergence(logits, near, event_ndim=0)
    right = reference.balanced_categorical_kl_divergence(
        logits.double(), near.double(), event_ndim=0
    )
    assert (kl >= 0).all()
    error = (kl - right).abs().mean() / right.mean()
    q, p = torch.log_softmax(logits, -1), torch.log_softmax(near, -1)
    plain = ((q.exp() * (q - p)).sum(-1) - right).abs().mean() / right.mean()
    assert error < 1e-2 < plain


# ---- What lies far away --------------------------------------------------------------------------


def test_a_component_met_exactly() -> None:
    """Where z is the mean, 1 / sigma may overflow: (z - mu) / sigma is 0 nevertheless."""
    z = torch.zeros(2, 3, requires_grad=True)
    logvar = torch.full((2, 3), -200.0, requires_grad=True)
    value = fastvae.mixture_log_prob(z, z.detach(), logvar)
    assert_close(value, reference.mixture_log_prob(z, z.detach(), logvar))
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (z, logvar)))
