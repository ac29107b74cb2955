"""torch.func, forward-mode differentiation and double backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cases import OPS, SEED, Op, each_op_and_form, op_id
from models import mlp
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import fastvae

each_op = pytest.mark.parametrize("op", OPS, ids=op_id)
# The formulas' noise and the kernels' differ by a few units in the last place of float32, which a
# log-ratio, quadratic in it, enlarges.
near = functools.partial(assert_close, rtol=2e-5, atol=2e-5)


def scalar(op: Op, param: str = "logvar") -> Callable[..., Tensor]:
    """One number that depends on every output, and not linearly."""
    return lambda *tensors: sum(y.sin().sum() for y in op(fastvae, tensors, param))


def leaves_of(op: Op, shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    return [t.requires_grad_() for t in op.inputs(shape, torch.float64, device=device)]


# ---- torch.func ----------------------------------------------------------------------------------


@each_op_and_form()
def test_grad(op: Op, param: str, device: torch.device) -> None:
    tensors = op.inputs((3, 4), torch.float64, param, device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    right = torch.autograd.grad(scalar(op, param)(*leaves), leaves)
    near(grad(scalar(op, param), tuple(range(len(tensors))))(*tensors), right)


@each_op
def test_jvp_is_the_transpose_of_vjp(op: Op, device: torch.device) -> None:
    tensors = op.inputs((3, 4), torch.float64, device=device)
    tangents = [torch.randn_like(t) for t in tensors]
    _, forward = jvp(lambda *t: op(fastvae, t), tuple(tensors), tuple(tangents))
    outputs, pull = vjp(lambda *t: op(fastvae, t), *tensors)
    cotangents = tuple(torch.randn_like(y) for y in outputs)
    pulled = pull(cotangents)
    left = sum((f * c).sum() for f, c in zip(forward, cotangents, strict=True))
    assert_close(left, sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True)))


@each_op
def test_jacobians_and_hessian(op: Op, device: torch.device) -> None:
    tensors = op.inputs((2, 3), torch.float64, device=device)
    numbers = tuple(range(len(tensors)))
    function = scalar(op)
    reverse = jacrev(function, numbers)(*tensors)
    assert_close(jacfwd(function, numbers)(*tensors), reverse)
    right = torch.autograd.functional.hessian(function, tuple(tensors))
    near(hessian(function, numbers)(*tensors), right)


@each_op
def test_vmap_is_a_loop(op: Op, device: torch.device) -> None:
    tensors = op.inputs((2, 3), torch.float64, device=device)
    many = [torch.stack([t, 2 * t, t + 1]) for t in tensors]
    mapped = vmap(lambda *t: op(fastvae, t))(*many)
    for k in range(3):
        single = op(fastvae, [t[k] for t in many])
        for y, value in zip(mapped, single, strict=True):
            near(y[k], value)


def test_vmap_over_seeds_is_one_seed_a_row(device: torch.device) -> None:
    mu, logvar = OPS[0].inputs((5, 7), torch.float64, device=device)
    seeds = torch.arange(5, device=device)
    right = fastvae.rsample_kl(mu, logvar, seed=seeds)
    mapped = vmap(lambda m, s, k: fastvae.rsample_kl(m[None], s[None], seed=k))(mu, logvar, seeds)
    for y, value in zip(mapped, right, strict=True):
        near(y[:, 0], value)


def test_vmap_obeys_randomness(device: torch.device) -> None:
    mu = torch.zeros(4, 6, device=device)

    def draw(mu: Tensor) -> Tensor:
        return fastvae.rsample(mu, 0.0)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(mu)
    same = vmap(draw, randomness="same")(mu)
    assert all(torch.equal(row, same[0]) for row in same)
    different = vmap(draw, randomness="different")(mu)
    assert len({tuple(row.tolist()) for row in different}) == 4


def test_grad_draws_the_noise_of_eager_code() -> None:
    mu = torch.zeros(4, 6, dtype=torch.float64)

    def loss(mu: Tensor) -> Tensor:
        return (fastvae.rsample(mu, 0.0) ** 3).sum()

    torch.manual_seed(3)
    leaf = mu.clone().requires_grad_()
    loss(leaf).backward()
    torch.manual_seed(3)
    near(grad(loss)(mu), leaf.grad)


def test_gradients_of_each_example_of_a_vae(device: torch.device) -> None:
    model, x = mlp(device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    seeds = torch.arange(len(x), device=device)

    def loss(parameters: dict[str, Tensor], x: Tensor, seed: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],), {"seed": seed}).loss

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, seeds)
    for k in range(len(x)):
        model.zero_grad()
        model(x[k : k + 1], seed=seeds[k]).loss.backward()
        for name, p in model.named_parameters():
            near(each[name][k], p.grad)


def test_a_transform_inside_a_compiled_function(device: torch.device) -> None:
    mu, logvar = OPS[0].inputs((3, 4), torch.float64, device=device)
    function = vmap(grad(lambda m, s: fastvae.kl_divergence(m, s, event_ndim=1)))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(mu, logvar), function(mu, logvar))


# ---- Autograd ------------------------------------------------------------------------------------


@each_op
def test_gradcheck_of_every_mode(op: Op, device: torch.device) -> None:
    for shape in ((2, 3), (1, 2, 2)):
        assert gradcheck(
            lambda *t: op(fastvae, t),
            leaves_of(op, shape, device),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
        )


@each_op
def test_gradgradcheck_of_every_mode(op: Op, device: torch.device) -> None:
    assert gradgradcheck(
        lambda *t: op(fastvae, t),
        leaves_of(op, (2, 3), device),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


def test_gradcheck_of_packed_parameters(device: torch.device) -> None:
    params = torch.randn(2, 6, dtype=torch.float64, device=device, requires_grad=True)

    def both(params: Tensor) -> tuple[Tensor, Tensor]:
        return fastvae.DiagonalGaussian.from_params(params).rsample_kl(seed=SEED)

    assert gradcheck(both, [params], check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(both, [params], check_batched_grad=True)


@each_op
def test_dual_numbers(op: Op, device: torch.device) -> None:
    tensors = op.inputs((3, 4), torch.float64, device=device)
    tangents = [torch.randn_like(t) for t in tensors]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        found = [forward_ad.unpack_dual(y).tangent for y in op(fastvae, duals)]
    right = jvp(lambda *t: op(fastvae, t), tuple(tensors), tuple(tangents))[1]
    assert_close(found, list(right))


def test_many_upstream_gradients_at_once(device: torch.device) -> None:
    """`is_grads_batched`, of a graph that was recorded by the fused ops."""
    mu, logvar = leaves_of(OPS[0], (3, 4), device)
    z, kl = fastvae.rsample_kl(mu, logvar, seed=SEED)
    upstream = torch.randn(5, *z.shape, dtype=z.dtype, device=device)
    rows = torch.randn(5, *kl.shape, dtype=z.dtype, device=device)
    batched = torch.autograd.grad(
        (z, kl), (mu, logvar), (upstream, rows), is_grads_batched=True, retain_graph=True
    )
    for k in range(5):
        right = torch.autograd.grad(
            (z, kl), (mu, logvar), (upstream[k], rows[k]), retain_graph=True
        )
        assert_close([g[k] for g in batched], list(right))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_final_loss_is_transformed_too(reduction: str, device: torch.device) -> None:
    x, mean = OPS[0].inputs((3, 4), torch.float64, device=device)

    def loss(mean: Tensor) -> Tensor:
        return fastvae.gaussian_nll_loss(x, mean, 0.3, reduction=reduction)

    leaf = mean.clone().requires_grad_()
    right = torch.autograd.grad(loss(leaf), leaf)[0]
    assert_close(grad(loss)(mean), right)
    assert_close(jacfwd(loss)(mean), right)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], right)
    assert gradcheck(loss, [leaf], check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, [leaf], check_batched_grad=True)
