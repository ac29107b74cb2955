"""Groups of classes, as world models have them: KL divergences with a balance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import placed, seeded
from test_mixtures import assert_close, gradients
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import fastvae
from fastvae import reference

pytestmark = pytest.mark.usefixtures("on_device")

# Rows, groups, classes.
SIZES = (
    (3, 2, 1),
    (3, 1, 2),
    (2, 5, 7),
    (2, 32, 32),
    (2, 40, 50),
    (1, 3, 40),
    (1, 2, 1300),
    (1, 1, 20001),
)
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}
BOTH = pytest.mark.parametrize("module", [fastvae, reference], ids=["fused", "reference"])
MIXES = pytest.mark.parametrize("uniform_mix", [0.0, 0.01])


def logits_of(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0, seed: int = 0
) -> Tensor:
    t = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    return (scale * t).to(dtype)


def mixed(logits: Tensor, uniform_mix: float) -> Tensor:
    return (1 - uniform_mix) * logits.softmax(-1) + uniform_mix / logits.shape[-1]


def exact_kl(
    q: Tensor, p: Tensor, balance: float = 0.8, uniform_mix: float = 0.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As papers write it, in float64, whose digits are enough."""

    def kl(q: Tensor, p: Tensor) -> Tensor:
        q, p = mixed(q, uniform_mix), mixed(p, uniform_mix)
        return (q * (q.log() - p.log())).sum((-2, -1))

    return gradients(
        lambda q, p: balance * kl(q.detach(), p) + (1 - balance) * kl(q, p.detach()),
        q.double(),
        p.double(),
    )


def check_kl(q: Tensor, p: Tensor, bound: float, **options: float) -> None:
    value, grads = gradients(
        lambda q, p: fastvae.balanced_categorical_kl_divergence(q, p, **options), q, p
    )
    right, right_grads = exact_kl(q, p, **options)
    assert_close(value, right, bound)
    for found, exact in zip(grads, right_grads, strict=True):
        assert_close(found, exact, bound)


@MIXES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, sizes: tuple[int, ...], uniform_mix: float
) -> None:
    q, p = (logits_of(*sizes, dtype=dtype, seed=k) for k in (1, 2))
    if sizes[-1] == 1:
        value, grads = gradients(fastvae.balanced_categorical_kl_divergence, q, p)
        assert not value.any()
        assert not any(g.any() for g in grads)
    else:
        check_kl(q, p, BOUNDS[dtype], uniform_mix=uniform_mix)


@MIXES
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])
def test_near_collapse(apart: float, uniform_mix: float) -> None:
    """Where q is nearly p, as they are trained to be: terms of both signs would cancel."""
    q = logits_of(4, 32, 32)
    p = q + apart * logits_of(4, 32, 32, seed=1)
    check_kl(q, p, 1e-6, uniform_mix=uniform_mix)
    check_kl(q, p + 1e3, 1e-6, uniform_mix=uniform_mix)  # one softmax, but for p's own rounding
    if apart < 1:
        value = kl_divergence(Categorical(logits=q), Categorical(logits=p)).sum(-1)
        with pytest.raises(AssertionError):  # the negative control: float32 as papers write it
            assert_close(value, exact_kl(q, p)[0], 1e-6)


@MIXES
@pytest.mark.parametrize("lead", [4.0, 8.0, 15.0])
def test_one_class_dominates(lead: float, uniform_mix: float) -> None:
    """The gradient of the class that has nearly all is what the others leave."""
    q, p = logits_of(8, 4, 32, scale=1.0), logits_of(8, 4, 32, scale=1.0, seed=1)
    q[..., 3] += lead
    p[..., 3] += lead - 1
    check_kl(q, p, 1e-6, uniform_mix=uniform_mix)
    p[..., 3] -= lead - 1
    p[..., 5] += lead
    check_kl(q, p, 1e-6, uniform_mix=uniform_mix)


def test_a_gradient_relative_to_nothing_is_found_out() -> None:
    """The negative control of the last one: softmax's own backward in float32."""
    q, p = logits_of(8, 4, 32, scale=1.0), logits_of(8, 4, 32, scale=1.0, seed=1)
    q[..., 3] += 15
    p[..., 3] += 14
    _, (right, _) = exact_kl(q, p, uniform_mix=0.01)
    _, (found, _) = gradients(
        lambda q, p: 0.2 * (mixed(q, 0.01) * (mixed(q, 0.01) / mixed(p, 0.01)).log()).sum((-2, -1)),
        q,
        p,
    )
    with pytest.raises(AssertionError):
        assert_close(found, right, 1e-6)


@BOTH
@MIXES
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_far_and_masked_classes(module: Any, dtype: torch.dtype, uniform_mix: float) -> None:
    q = torch.tensor([[100.0, -100, 0], [-100, 100, 0], [0, 1, -math.inf], [3, -math.inf, 1]])
    p = torch.tensor([[-100.0, 100, 0], [-100, 100, 1], [1, 0, -math.inf], [1, 2, 3]])
    q, p = q.to(dtype), p.to(dtype)
    options = {"uniform_mix": uniform_mix, "event_ndim": 0}
    value, grads = gradients(
        lambda q, p: module.balanced_categorical_kl_divergence(q, p, **options), q, p
    )
    right = kl_divergence(
        Categorical(mixed(q.double(), uniform_mix)), Categorical(mixed(p.double(), uniform_mix))
    )
    if uniform_mix == 0:
        right[0] = 200
        right[1] = 0  # q and p have 1 - e^-100 of that class; what is left is below any bound
    torch.testing.assert_close(value.double(), right, rtol=1e-6, atol=1e-20)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][2:].masked_select(q[2:] == -math.inf).any()
    never = module.balanced_categorical_kl_divergence(p, q, uniform_mix=uniform_mix, event_ndim=0)
    assert never.isinf().tolist() == [False, False, False, uniform_mix == 0]


@BOTH
def test_the_value_is_never_negative(module: Any) -> None:
    for seed in range(20):
        q = logits_of(64, 7, seed=seed)
        p = q + 1e-6 * logits_of(64, 7, seed=seed + 1)
        for uniform_mix in (0.0, 0.01):
            options = {"uniform_mix": uniform_mix, "event_ndim": 0}
            assert (module.balanced_categorical_kl_divergence(q, p, **options) >= 0).all()
            assert not module.balanced_categorical_kl_divergence(q, q, **options).any()


@pytest.mark.parametrize("balance", [0.0, 0.25, 1.0])
@BOTH
def test_the_gradient_is_shared_out(module: Any, balance: float) -> None:
    q, p = (logits_of(3, 4, 5, dtype=torch.float64, seed=k) for k in (1, 2))
    value, grads = gradients(
        lambda q, p: module.balanced_categorical_kl_divergence(q, p, balance=balance), q, p
    )
    right, right_grads = exact_kl(q, p, balance)
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(grads, right_grads, rtol=1e-9, atol=1e-12)
    _, others = exact_kl(q, p, balance + 0.01)
    assert not torch.allclose(grads[0], others[0], rtol=1e-4)


@BOTH
@MIXES
@pytest.mark.parametrize("sizes", [(9, 4, 5), (9, 40, 50)], ids=str)
def test_free_nats_clip_each_row(module: Any, sizes: tuple[int, ...], uniform_mix: float) -> None:
    q, p = (logits_of(*sizes, seed=k) for k in (1, 2))
    options: dict[str, float] = {"uniform_mix": uniform_mix}
    kl, grads = gradients(
        lambda q, p: module.balanced_categorical_kl_divergence(q, p, **options), q, p
    )
    options["free_nats"] = kl.median().item()
    clipped, clipped_grads = gradients(
        lambda q, p: module.balanced_categorical_kl_divergence(q, p, **options), q, p
    )
    assert torch.equal(clipped, kl.clamp(min=kl.median()))
    below = kl < kl.median()
    assert below.sum() == 4
    for found, all_of_them in zip(clipped_grads, grads, strict=True):
        assert not found[below].any()
        assert torch.equal(found[~below], all_of_them[~below])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    q, p = (logits_of(3, 4, 37, dtype=dtype, seed=k) for k in (1, 2))
    value, grads = gradients(fastvae.balanced_categorical_kl_divergence, q, p)
    wide, wide_grads = gradients(fastvae.balanced_categorical_kl_divergence, q.float(), p.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, wide)
    for narrow, right in zip(grads, wide_grads, strict=True):
        assert torch.equal(narrow, right.to(dtype))
    other = fastvae.balanced_categorical_kl_divergence(q, p.double())
    assert other.dtype == torch.float64


def test_shapes_and_strides() -> None:
    kl = fastvae.balanced_categorical_kl_divergence
    q, p = (logits_of(2, 3, 4, 5, seed=k) for k in (1, 2))
    each = kl(q, p, event_ndim=0)
    assert each.shape == (2, 3, 4)
    for event_ndim in (1, 2, 3):
        dims = tuple(range(-event_ndim, 0))
        torch.testing.assert_close(kl(q, p, event_ndim=event_ndim), each.sum(dims))
    torch.testing.assert_close(kl(q, p), each.sum((1, 2)))
    assert torch.equal(kl(q[0, 0, 0], p[0, 0, 0]), each[0, 0, 0])
    turned = q.transpose(0, 3).contiguous().transpose(0, 3)
    assert torch.equal(kl(turned, p), kl(q, p))
    assert torch.equal(kl(q, p[0, 0]), kl(q, p[0, 0].expand(q.shape)))
    _, (_, grad) = gradients(kl, q, p[0, 0])
    assert grad.shape == (4, 5)
    assert kl(q[:0], p[:0]).shape == (0,)
    assert not kl(q[:, :0], p[:, :0]).any()


def test_nan_comes_out() -> None:
    kl = fastvae.balanced_categorical_kl_divergence
    q, p = (logits_of(4, 2, 20, seed=k) for k in (1, 2))
    q[1, 1, 3] = math.nan
    p[2, 0, 19] = math.nan
    q[3, 0] = -math.inf
    for uniform_mix in (0.0, 0.01):
        value = kl(q, p, uniform_mix=uniform_mix)
        assert value.isnan().tolist() == [False, True, True, True]
        value = kl(p, q, uniform_mix=uniform_mix, free_nats=1e9)
        assert value.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"balance": 1.5}, ValueError, "balance is 1.5; want 0 to 1"),
        ({"uniform_mix": 1.0}, ValueError, "uniform_mix is 1.0; want 0 or more, below 1"),
        ({"uniform_mix": math.nan}, ValueError, "uniform_mix is nan"),
        ({"free_nats": -1.0}, ValueError, "free_nats is -1.0; want 0 or more"),
        ({"event_ndim": 2}, ValueError, "event_ndim is 2; want 0 to 1"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "broadcast"),
        ({"logits": torch.zeros(3, 0), "prior_logits": torch.zeros(3, 0)}, ValueError, "classes"),
        ({"prior_logits": torch.zeros(4, 5)}, ValueError, "broadcast"),
        ({"prior_logits": torch.zeros(3, 5).cfloat()}, TypeError, "prior_logits has dtype"),
    ],
    ids=str,
)
@BOTH
def test_errors(module: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    logits = {"logits": torch.zeros(3, 5), "prior_logits": torch.zeros(3, 5)}
    arguments = placed({**logits, **options})
    with pytest.raises(error, match=message):
        module.balanced_categorical_kl_divergence(**arguments)


@MIXES
def test_second_derivatives_and_transforms(uniform_mix: float) -> None:
    q, p = (logits_of(2, 3, 4, dtype=torch.float64, seed=k) for k in (1, 2))

    def of_q(q: Tensor) -> Tensor:  # whose gradient is that of the value
        options = {"balance": 0.0, "uniform_mix": uniform_mix}
        return fastvae.balanced_categorical_kl_divergence(q, p, **options)

    assert torch.autograd.gradcheck(of_q, q.requires_grad_())
    assert torch.autograd.gradgradcheck(of_q, q)
    q = q.detach()
    kl = fastvae.balanced_categorical_kl_divergence
    alone = torch.func.vmap(lambda q, p: kl(q, p, event_ndim=1))(q, p)
    torch.testing.assert_close(alone, kl(q, p))


def test_compile() -> None:
    q, p = (logits_of(3, 4, 50, seed=k) for k in (1, 2))

    def f(q: Tensor, p: Tensor) -> Tensor:
        return fastvae.balanced_categorical_kl_divergence(q, p, uniform_mix=0.01, free_nats=1.0)

    value, grads = gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), q, p)
    eager, eager_grads = gradients(f, q, p)
    assert torch.equal(value, eager)
    assert all(map(torch.equal, grads, eager_grads))


def test_operators_are_registered_as_pytorch_wants() -> None:
    if not fastvae.backend.HAS_BINARY:
        pytest.skip("no binary")
    q, p = (logits_of(3, 4, 5, seed=k) for k in (1, 2))
    tests = ("test_schema", "test_faketensor")
    kl = torch.ops.fastvae.balanced_categorical_kl_divergence
    settings = (0.8, 0.01, 1.0, 1)
    torch.library.opcheck(kl.default, (q, p, *settings), test_utils=tests)
    backward = torch.ops.fastvae.balanced_categorical_kl_divergence_backward
    torch.library.opcheck(backward.default, (torch.ones(3), q, p, *settings, 2), test_utils=tests)
    with pytest.raises(RuntimeError, match="event_ndim is 3, want 0 to 2"):
        kl(q, p, 0.8, 0.01, 1.0, 3)
    with pytest.raises(RuntimeError, match="prior_logits has shape"):
        kl(q, p[:2], *settings)
