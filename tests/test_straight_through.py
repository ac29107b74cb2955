"""Groups of classes, as world models have them: samples with the gradient of probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import placed, seeded
from test_categoricals import BOTH, BOUNDS, MIXES, SIZES, logits_of, mixed
from test_mixtures import assert_close, gradients
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae.ops import noise

pytestmark = pytest.mark.usefixtures("on_device")

Function = Callable[..., Any]


def is_one_hot(z: Tensor) -> bool:
    return bool(((z == 0) | (z == 1)).all() and (z.sum(-1) == 1).all())


@BOTH
@MIXES
def test_classes_are_drawn_as_often_as_is_likely(module: Any, uniform_mix: float) -> None:
    logits = logits_of(20, scale=3.0)
    z = module.straight_through_categorical(
        logits.expand(500, 40, 20), uniform_mix=uniform_mix, seed=5
    )
    assert is_one_hot(z)
    count, p = z.sum((0, 1)).double(), mixed(logits.double(), uniform_mix)
    error = (count - 20000 * p) / (20000 * p * (1 - p)).sqrt()
    assert error.abs().max() < 4
    if uniform_mix == 0:  # the negative control
        p = mixed(logits.double(), 0.05)
        error = (count - 20000 * p) / (20000 * p * (1 - p)).sqrt()
        assert error.abs().max() > 4


@MIXES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_reference_draws_the_same(
    dtype: torch.dtype, sizes: tuple[int, ...], uniform_mix: float
) -> None:
    logits = logits_of(*sizes, dtype=dtype)
    seeds = torch.arange(sizes[0]) - 1
    for seed in (0, -(2**63), 2**40 + 1, seeds):
        options: dict[str, Any] = {"uniform_mix": uniform_mix, "seed": seed}
        z = fastvae.straight_through_categorical(logits, **options)
        assert z.dtype == dtype
        assert torch.equal(z, reference.straight_through_categorical(logits, **options))
    other = fastvae.straight_through_categorical(logits, uniform_mix=uniform_mix, seed=1)
    if sizes[-1] > 2 and sizes[1] > 1:
        assert not torch.equal(z, other)


def test_where_a_word_is_near_a_boundary() -> None:
    """Of many groups a few may be drawn otherwise by exponentials of other rounding, but only where
    the uniform number is as near to a boundary as these are to each other."""
    logits = logits_of(2000, 32, 32)
    z = fastvae.straight_through_categorical(logits, seed=9).argmax(-1)
    other = reference.straight_through_categorical(logits, seed=9).argmax(-1)
    differ = z != other
    assert differ.sum() <= 3
    uniforms = noise.uniforms(torch.tensor(9), (2000, 32))
    until = logits.double().softmax(-1).cumsum(-1)
    nearest = (until - uniforms[..., None]).abs().amin(-1)
    assert (nearest[differ] < 1e-6).all()
    assert (nearest < 1e-6).sum() < 10  # which says something


def test_noise_is_that_of_the_contract() -> None:
    """A group is a column; with a seed for each row, rows do not depend on each other."""
    logits = logits_of(5, 3, 3, 7)
    z = fastvae.straight_through_categorical(logits, seed=4)
    assert torch.equal(
        z, fastvae.straight_through_categorical(logits.flatten(1, 2), seed=4).view_as(z)
    )
    assert torch.equal(z[:2], fastvae.straight_through_categorical(logits[:2], seed=4))
    seeds = torch.tensor([7, 8, 9, 7, 8])
    z = fastvae.straight_through_categorical(logits, seed=seeds)
    for row, seed in enumerate(seeds.tolist()):
        alone = fastvae.straight_through_categorical(logits[row : row + 1], seed=seed)
        assert torch.equal(z[row : row + 1], alone)
    flat = fastvae.straight_through_categorical(logits[0, 0, 0], seed=4)
    assert torch.equal(flat, fastvae.straight_through_categorical(logits[:1, 0, 0], seed=4)[0])
    torch.manual_seed(3)
    drawn = fastvae.straight_through_categorical(logits)
    torch.manual_seed(3)
    assert torch.equal(drawn, fastvae.straight_through_categorical(logits))
    generator = seeded(3)
    other = fastvae.straight_through_categorical(logits, generator=generator)
    assert torch.equal(
        other, fastvae.straight_through_categorical(logits, seed=fastvae.draw_seed(seeded(3)))
    )


def exact_gradient(logits: Tensor, uniform_mix: float) -> tuple[Tensor, ...]:
    return gradients(lambda t: mixed(t, uniform_mix), logits.double())[1]


def sampled_gradient(logits: Tensor, uniform_mix: float) -> tuple[Tensor, ...]:
    return gradients(
        lambda t: fastvae.straight_through_categorical(t, uniform_mix=uniform_mix, seed=1), logits
    )[1]


@MIXES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_gradient_is_that_of_the_probabilities(
    dtype: torch.dtype, sizes: tuple[int, ...], uniform_mix: float
) -> None:
    logits = logits_of(*sizes, dtype=dtype)
    (found,) = sampled_gradient(logits, uniform_mix)
    (right,) = exact_gradient(logits, uniform_mix)
    assert found.dtype == dtype
    if sizes[-1] == 1:
        assert not found.any()
    else:
        assert_close(found, right, BOUNDS[dtype])


@pytest.mark.parametrize("lead", [8.0, 15.0, 25.0])
def test_the_gradient_where_one_class_dominates(lead: float) -> None:
    logits = logits_of(8, 4, 32, scale=1.0)
    logits[..., 3] += lead
    (right,) = exact_gradient(logits, 0.01)
    assert_close(sampled_gradient(logits, 0.01)[0], right, 1e-6)
    (found,) = gradients(lambda t: mixed(t, 0.01), logits)[1]  # the negative control: softmax's own
    with pytest.raises(AssertionError):
        assert_close(found, right, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = logits_of(3, 4, 37, dtype=dtype)
    z = fastvae.straight_through_categorical(logits, seed=1)
    wide = fastvae.straight_through_categorical(logits.float(), seed=1)
    assert z.dtype == dtype
    assert torch.equal(z.float(), wide)
    leaf = logits.clone().requires_grad_()
    upstream = logits_of(3, 4, 37, dtype=dtype, seed=4)
    z = fastvae.straight_through_categorical(leaf, seed=1)
    (narrow,) = torch.autograd.grad(z, leaf, upstream)
    leaf = logits.float().requires_grad_()
    z = fastvae.straight_through_categorical(leaf, seed=1)
    (right,) = torch.autograd.grad(z, leaf, upstream.float())
    assert torch.equal(narrow, right.to(dtype))


@BOTH
def test_masked_classes_and_nan(module: Any) -> None:
    logits = logits_of(200, 3, 5)
    logits[..., 1] = -math.inf
    logits[..., 4] = -100
    z = module.straight_through_categorical(logits, seed=1)
    assert is_one_hot(z)
    assert not z[..., [1, 4]].any()
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(module.straight_through_categorical(leaf, seed=1).sum(), leaf)
    assert grad.isfinite().all()
    assert not grad[..., 1].any()
    z = module.straight_through_categorical(logits, uniform_mix=0.5, seed=1)
    assert is_one_hot(z)
    assert z[..., 1].any()  # of the uniform part
    logits[0, 0, 2] = math.nan
    logits[1, 1] = -math.inf
    logits[2, 2, 0] = math.inf
    for uniform_mix in (0.0, 0.01):
        z = module.straight_through_categorical(logits, uniform_mix=uniform_mix, seed=1)
        bad = z.isnan()
        assert bad.all(-1).nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
        assert bad.any(-1).sum() == 3


def test_shapes_and_strides() -> None:
    draw = fastvae.straight_through_categorical
    logits = logits_of(4, 3, 2, 6)
    z = draw(logits, seed=1)
    turned = logits.transpose(0, 3).contiguous().transpose(0, 3)
    assert torch.equal(draw(turned, seed=1), z)
    assert torch.equal(
        draw(logits[:, :, :1].expand(4, 3, 2, 6), seed=1)[:, :, :1].sum(-1), z.new_ones(4, 3, 1)
    )
    assert draw(logits[:0], seed=1).shape == (0, 3, 2, 6)
    assert draw(logits[:, :0], seed=1).shape == (4, 0, 2, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"uniform_mix": -0.1}, ValueError, "uniform_mix is -0.1; want 0 or more, below 1"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "classes"),
        ({"logits": torch.tensor(1.0)}, ValueError, "classes"),
        ({"logits": torch.zeros(3, 5).cfloat()}, TypeError, "logits has dtype"),
        ({"seed": torch.zeros(4, dtype=torch.int64)}, ValueError, r"seed has shape \[4\]"),
        ({"seed": 1.5}, TypeError, "seed is 1.5"),
    ],
    ids=str,
)
@BOTH
def test_errors(module: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = placed({"logits": torch.zeros(3, 5), **options})
    with pytest.raises(error, match=message):
        module.straight_through_categorical(**arguments)


def test_second_derivatives_and_transforms() -> None:
    """The gradient of the straight-through gradient is that of the probabilities' gradient."""
    logits = logits_of(2, 3, 4, dtype=torch.float64).requires_grad_()
    upstream = logits_of(2, 3, 4, dtype=torch.float64, seed=1).requires_grad_()

    def gradient(f: Function) -> Function:
        return lambda t, g: torch.autograd.grad(f(t), t, g, create_graph=True)[0]

    draw = gradient(lambda t: fastvae.straight_through_categorical(t, uniform_mix=0.1, seed=1))
    right = gradient(lambda t: mixed(t, 0.1))
    torch.testing.assert_close(draw(logits, upstream), right(logits, upstream))
    weights = logits_of(2, 3, 4, dtype=torch.float64, seed=2)
    found = torch.autograd.grad(draw(logits, upstream), (logits, upstream), weights)
    torch.testing.assert_close(
        found, torch.autograd.grad(right(logits, upstream), (logits, upstream), weights)
    )
    t = logits.detach()
    seeds = torch.arange(2)
    alone = torch.func.vmap(lambda t, s: fastvae.straight_through_categorical(t, seed=s))(t, seeds)
    for row in range(2):
        assert torch.equal(alone[row], fastvae.straight_through_categorical(t[row], seed=row))


def test_compile() -> None:
    logits = logits_of(3, 4, 50)

    def f(t: Tensor) -> Tensor:
        return fastvae.straight_through_categorical(t, uniform_mix=0.01, seed=2)

    value, grads = gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), logits)
    eager, eager_grads = gradients(f, logits)
    assert torch.equal(value, eager)
    assert torch.equal(grads[0], eager_grads[0])
    torch.manual_seed(5)
    drawn = torch.compile(
        lambda t: fastvae.straight_through_categorical(t), fullgraph=True, backend="aot_eager"
    )(logits)
    torch.manual_seed(5)
    assert torch.equal(drawn, fastvae.straight_through_categorical(logits))


def test_operators_are_registered_as_pytorch_wants() -> None:
    if not fastvae.backend.HAS_BINARY:
        pytest.skip("no binary")
    logits, seed = logits_of(3, 4, 5), torch.tensor(3)
    tests = ("test_schema", "test_faketensor")
    draw = torch.ops.fastvae.straight_through_categorical
    torch.library.opcheck(draw.default, (logits, seed, 0.01), test_utils=tests)
    backward = torch.ops.fastvae.straight_through_categorical_backward
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(draw.default, (turned, seed, 0.01), test_utils=tests)
    torch.library.opcheck(backward.default, (logits, turned, seed, 0.01, 1), test_utils=tests)
    with pytest.raises(RuntimeError, match="seed must be int64 of shape"):
        draw(logits, torch.arange(2), 0.01)
    with pytest.raises(RuntimeError, match="grad_z has shape"):
        backward(logits[:2], logits, seed, 0.01, 1)
