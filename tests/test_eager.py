"""The formulas that compute where there are no kernels, at the speed of eager code."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from accuracy import error, exact, upstream_like
from cases import DTYPES, NOT_DERIVATIVES, OPS, SEED, Op, each_op_and_form, op_id
from test_extremes import each_op_and_param, grid
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import fastvae
from fastvae import reference
from fastvae.ops.op import OPS as DECLARED
from fastvae.ops.remembered import Remembered

each_op = pytest.mark.parametrize("op", OPS, ids=op_id)
# Of float32 arithmetic, which here keeps five digits of a KL divergence near 0.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-5 + 2**-8,
    torch.float16: 2e-5 + 2**-11,
}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with fastvae.use_backend("eager"), mock.patch("accuracy.kernel_noise", reference.noise):
        yield


# ---- Values and gradients ------------------------------------------------------------------------


@each_op_and_form((*OPS, *NOT_DERIVATIVES))
def test_values_and_gradients(op: Op, param: str) -> None:
    for dtype, shape in zip(
        (*DTYPES, torch.float32), ((4, 20), (2, 3, 5), (3, 1), (5,), ()), strict=True
    ):
        for event_ndim in {None, 0, len(shape)}:
            leaves = [t.requires_grad_() for t in op.inputs(shape, dtype, param)]
            outputs = op(fastvae, leaves, param, event_ndim=event_ndim)
            upstream = upstream_like([y.detach() for y in outputs])
            grads = torch.autograd.grad(outputs, leaves, upstream)
            options = {"event_ndim": event_ndim}
            right = exact(op, leaves, param, **options)
            slopes = exact(op, leaves, param, **options, upstream=upstream)
            for results, true in ((outputs, right), (grads, slopes)):
                for y, value, size in zip(results, true.values, true.magnitudes, strict=True):
                    assert error(y, value, size) <= TOLERANCE[y.dtype]


@each_op_and_param
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_nan_of_its_own(op: Op, param: str, dtype: torch.dtype) -> None:
    """Of finite numbers, however large, where the definition makes none."""
    columns = torch.stack(grid(op, dtype, param, torch.device("cpu")))
    tensors = [*columns[:, columns.isfinite().all(0)]]
    results = []
    for module in (fastvae, reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs = op(module, leaves, param, event_ndim=0)
        total = sum(y.sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(total, leaves, allow_unused=True)])
    for y, value in zip(*results, strict=True):
        assert not (y.isnan() & ~value.isnan()).any()


def test_the_mean_met_exactly() -> None:
    """Where x = mean, 1/sigma may overflow: (x - mean) / sigma is 0 nevertheless."""
    x = torch.tensor([0.0, 1.5], requires_grad=True)
    s = torch.full((2,), -1e4, requires_grad=True)
    value = fastvae.gaussian_log_prob(x, x.detach(), s, event_ndim=0)
    kl = fastvae.kl_divergence(x, s, x.detach(), s.detach(), event_ndim=0)
    assert_close(value, reference.gaussian_log_prob(x, x, s, event_ndim=0))
    assert torch.equal(kl, torch.zeros(2))
    assert all(g.isfinite().all() for g in torch.autograd.grad((value + kl).sum(), (x, s)))


def test_a_rate_of_zero() -> None:
    x, rate = torch.tensor([0.0, 2.0]), torch.zeros(2, requires_grad=True)
    log_probs = (
        fastvae.poisson_log_prob(x, rate, event_ndim=0),
        fastvae.negative_binomial_log_prob(x, rate, 3.0, event_ndim=0),
    )
    for value in log_probs:
        assert value.tolist() == [0, -torch.inf]
        assert torch.autograd.grad(value[0], rate)[0][0] == -1


def test_a_kl_near_0_keeps_its_digits() -> None:
    """Where `logvar.exp() - 1 - logvar` has none left."""
    size = torch.logspace(-12, 1, 4001)
    logvar = torch.cat([-size, torch.zeros(1), size]).requires_grad_()
    kl = fastvae.kl_divergence(torch.zeros(()), logvar, event_ndim=0)
    exact = logvar.detach().double().requires_grad_()
    right = reference.kl_divergence(torch.zeros_like(exact), exact, event_ndim=0)
    assert (kl >= 0).all()
    assert_close(kl.double(), right, rtol=2e-5, atol=1e-36)
    slopes = torch.autograd.grad(kl.sum(), logvar)[0]
    assert_close(slopes.double(), torch.autograd.grad(right.sum(), exact)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("theta", [1e-3, 1.0, 299.0, 301.0, 1e4, 1e8])
def test_a_dispersion_of_any_size(theta: float) -> None:
    x = torch.tensor([0.0, 1.0, 7.0, 300.0])
    mean = torch.tensor([0.5, 2.0, 9.0, 250.0])
    value = fastvae.negative_binomial_log_prob(x, mean, theta, event_ndim=0)
    right = reference.negative_binomial_log_prob(x.double(), mean.double(), theta, event_ndim=0)
    assert_close(value.double(), right, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("shape", [(3, 5), (5,), ()], ids=["a cell", "a gene", "all"])
def test_derivatives_of_rates(shape: tuple[int, ...]) -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 7.0, 400.0], dtype=torch.float64).expand(3, 5)
    rate = (torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_()
    assert_close(fastvae.poisson_log_prob(x, rate), reference.poisson_log_prob(x, rate))
    assert gradcheck(functools.partial(fastvae.poisson_log_prob, x), [rate])
    assert gradgradcheck(functools.partial(fastvae.poisson_log_prob, x), [rate])
    nothing = torch.zeros(2, requires_grad=True)
    value = fastvae.poisson_log_prob(torch.zeros(2), nothing)
    assert_close(torch.autograd.grad(value.sum(), nothing)[0], torch.full((2,), -1.0))


def test_a_count_for_several_rates() -> None:
    """Data of fewer dimensions, or of size 1, than what is broadcast against them."""
    means, theta = (torch.rand(4, 5) + 0.5 for _ in range(2))
    for shape in ((5,), (1, 5), (4, 1), ()):
        x = torch.full(shape, 3.0)
        for name, leaves in (("poisson", [means]), ("negative_binomial", [means, theta[:1]])):
            leaves = [t.clone().requires_grad_() for t in leaves]
            both = [getattr(m, f"{name}_log_prob")(x, *leaves) for m in (fastvae, reference)]
            assert_close(*both, rtol=1e-5, atol=1e-5)
            assert_close(*(torch.autograd.grad(y.sum(), leaves) for y in both))


@pytest.mark.parametrize("shape", [(3, 5), (5,), ()], ids=["a cell", "a gene", "all"])
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zero-inflated"])
def test_derivatives_of_counts_that_need_none(shape: tuple[int, ...], zeros: bool) -> None:
    """As data are, and with dispersions on both sides of the limit."""
    name = f"{'zero_inflated_' * zeros}negative_binomial_log_prob"
    x = torch.tensor([0.0, 0.0, 1.0, 7.0, 400.0], dtype=torch.float64).expand(3, 5)
    mean = (torch.rand(3, 5, dtype=torch.float64) + 0.5).requires_grad_()
    for size in (1.0, 1e3):
        theta = ((torch.rand(shape, dtype=torch.float64) + 0.5) * size).requires_grad_()
        leaves = [mean, theta]
        if zeros:
            leaves += [torch.randn(3, 5, dtype=torch.float64, requires_grad=True)]
        values, right = (getattr(m, name)(x, *leaves).sum() for m in (fastvae, reference))
        assert_close(values, right, rtol=1e-6, atol=0)
        slopes, right = (torch.autograd.grad(y, leaves) for y in (values, right))
        assert_close(slopes, right, rtol=1e-5, atol=1e-7)  # x theta^-3
        assert gradcheck(lambda *t: getattr(fastvae, name)(x, *t), leaves)
        assert gradgradcheck(lambda *t: getattr(fastvae, name)(x, *t), leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(), (4, 5), (0, 3), (4, 3, 2)], ids=str)
def test_losses(reduction: str, shape: tuple[int, ...]) -> None:
    losses = {
        "gaussian": [(), (0.3,), (torch.tensor(0.3),), (torch.rand(shape),)],
        "laplace": [(), (torch.rand(shape),)],
        "bernoulli": [()],
        "poisson": [()],
        "negative_binomial": [(torch.ones(()),)],
    }
    for name, scales in losses.items():
        for scale in scales:
            x, y = torch.rand(shape), torch.rand(shape, requires_grad=True)
            loss = getattr(fastvae, f"{name}_nll_loss")(x, y, *scale, reduction=reduction)
            right = getattr(reference, f"{name}_nll_loss")(x, y, *scale, reduction=reduction)
            assert_close(loss, right, equal_nan=True)
            if y.numel():
                assert_close(torch.autograd.grad(loss, y), torch.autograd.grad(right, y))


# ---- Noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_that_of_pytorch(dtype: torch.dtype) -> None:
    mu, logvar = (torch.randn(4, 6, dtype=dtype, requires_grad=True) for _ in range(2))
    for source in (None, torch.Generator()):
        for generator in (torch, source or torch):
            generator.manual_seed(3)
        eps = torch.randn(2, 4, 6, generator=source, dtype=max(dtype, torch.float32, key=_bytes))
        for generator in (torch, source or torch):
            generator.manual_seed(3)
        z = fastvae.rsample(mu, logvar, sample_shape=(2,), generator=source)
        sigma = (logvar.to(eps.dtype) / 2).exp()
        assert_close(z, (mu + sigma * eps).to(dtype))
        (slope,) = torch.autograd.grad(z.sum(), logvar)  # by the noise that was drawn
        assert_close(slope, (sigma * eps / 2).sum(0).to(dtype))


def test_noise_beside_weights_is_that_of_pytorch() -> None:
    mu, logvar, weight = torch.randn(3, 4, 6).unbind()
    torch.manual_seed(3)
    eps = torch.randn(4, 6)
    torch.manual_seed(3)
    z, _ = fastvae.rsample_kl(mu, logvar, weight=weight)
    assert_close(z, mu + (logvar / 2).exp() * eps)


def _bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize


@pytest.mark.parametrize(
    "seed", [SEED, torch.tensor(SEED), torch.arange(4)], ids=["int", "0-d", "rows"]
)
def test_a_seed_stands_for_the_same_noise_as_everywhere(seed: Tensor | int) -> None:
    mu, logvar = (torch.randn(4, 6) for _ in range(2))
    z, kl = fastvae.rsample_kl(mu, logvar, seed=seed)
    right, right_kl = reference.rsample_kl(mu, logvar, seed=seed)
    assert_close(z, right)
    assert_close(kl, right_kl)


def test_other_backends_draw_seeds_from_a_generator() -> None:
    mu = torch.zeros(4, 6)
    for name in ("native", "reference"):
        with fastvae.use_backend(name):
            z = fastvae.rsample(mu, 0.0, generator=torch.Generator().manual_seed(3))
        seed = fastvae.draw_seed(torch.Generator().manual_seed(3))
        assert_close(z, reference.rsample(mu, 0.0, seed=seed))


# ---- Calls that come again -----------------------------------------------------------------------


def test_a_call_seen_before_is_not_checked_again() -> None:
    find = DECLARED["rsample_kl"].find_eager
    remembered = Remembered(mock.Mock(side_effect=find))
    mu, logvar = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    results = []
    for _ in range(3):
        torch.manual_seed(3)
        results.append(remembered((mu, logvar), {"event_ndim": 1}))
    assert remembered._find.call_count == 1
    torch.manual_seed(3)
    right = reference.rsample_kl(mu, logvar, event_ndim=1)
    for z, kl in results:
        assert_close(kl, right[1])
        assert torch.equal(z, results[0][0])
        assert z.requires_grad
    assert remembered((mu, logvar), {"event_ndim": 0})[1].shape == (4, 6)
    assert remembered((mu[:2], logvar[:2]), {"event_ndim": 1})[1].shape == (2,)
    assert remembered._find.call_count == 3
    with fastvae.use_backend("reference"):
        assert remembered((mu, logvar), {"event_ndim": 1}) is NotImplemented


def test_what_is_special_is_not_taken_for_what_came_before() -> None:
    x, mean = torch.rand(4, 6), torch.rand(4, 6, requires_grad=True)
    for loss in (fastvae.gaussian_log_prob, fastvae.gaussian_nll_loss):
        right = loss(x, mean, 0.5, event_ndim=1)
        with pytest.raises(TypeError, match="event_ndim"):
            loss(x, mean, 0.5, event_ndim=True)
        with pytest.raises(TypeError, match="sparse"):
            loss(x.to_sparse(), mean, 0.5, event_ndim=1)
        with pytest.raises(ValueError, match="broadcast"):
            loss(x[:3], mean, 0.5, event_ndim=1)
        assert_close(loss(x, mean, 0.5, event_ndim=1, weight=torch.ones(4, 6)), right)
        assert loss(x.double(), mean.double(), 0.5, event_ndim=1).dtype == torch.float64
        assert loss(x, mean, 1, event_ndim=1).sum() != right.sum()
    assert_close(fastvae.gaussian_log_prob(0.5, mean), fastvae.gaussian_log_prob(x * 0 + 0.5, mean))
    assert_close(fastvae.rsample_kl(0.0, mean)[1], fastvae.kl_divergence(mean * 0, mean))
    z = [fastvae.rsample(mean, mean, seed=seed) for seed in (None, 0, 1, 0)]
    assert torch.equal(z[1], z[3])
    assert not torch.equal(z[1], z[2])


@pytest.mark.parametrize("shapes", [((), (3, 1), (5,)), ((5,), (3, 1), (2, 1, 1))], ids=str)
def test_what_broadcasts_is_remembered_too(shapes: tuple[tuple[int, ...], ...]) -> None:
    calls: list[tuple[str, dict[str, object], int]] = [
        ("gaussian_log_prob", {"param": "log_std"}, 3),
        ("gaussian_log_prob", {"param": "softplus", "min_std": 0.1}, 3),
        ("laplace_log_prob", {}, 3),
        ("bernoulli_log_prob", {}, 2),
        ("continuous_bernoulli_log_prob", {}, 2),
        ("poisson_log_prob", {}, 2),
        ("negative_binomial_log_prob", {}, 3),
        ("kl_divergence", {}, 2),
        ("kl_divergence", {"min_std": 0.2}, 2),
    ]
    for name, options, count in calls:
        op = DECLARED[name]
        for ndim in range(len(shapes[0]) + 1):
            tensors = [torch.rand(shape) + 0.5 for shape in shapes[:count]]
            options = {**options, "event_ndim": ndim}
            found = Remembered(op.find_eager)((*tensors,), options)
            assert_close(found, getattr(reference, name)(*tensors, **options))


def test_only_so_many_are_remembered() -> None:
    remembered = Remembered(DECLARED["gaussian_log_prob"].find_eager)
    x = torch.rand(2, 3)
    for i in range(1000):
        remembered((x, x, i / 1000), {})
    assert 0 < len(remembered._known) <= 256


# ---- What PyTorch does with functions ------------------------------------------------------------


def leaves_of(op: Op, shape: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    return [t.requires_grad_() for t in op.inputs(shape, torch.float64)]


@each_op
def test_every_order_of_differentiation(op: Op) -> None:
    call = functools.partial(op, fastvae)
    assert gradcheck(
        lambda *t: call(t), leaves_of(op), check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(lambda *t: call(t), leaves_of(op), check_batched_grad=True)


@each_op
def test_transforms_and_the_compiler(op: Op) -> None:
    tensors = op.inputs((2, 3), torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        return sum(y.sin().sum() for y in op(fastvae, tensors))

    numbers = tuple(range(len(tensors)))
    leaves = [t.clone().requires_grad_() for t in tensors]
    right = torch.autograd.grad(loss(*leaves), leaves)
    assert_close(grad(loss, numbers)(*tensors), right)
    each = vmap(grad(loss, numbers))(*(torch.stack([t, t]) for t in tensors))
    assert_close([g[1] for g in each], [*right])
    _, slope = jvp(loss, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    assert_close(slope, sum(g.sum() for g in right))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(*leaves), leaves), right)


def test_noise_under_transforms_and_the_compiler() -> None:
    def draw(mu: Tensor) -> Tensor:
        return fastvae.rsample(mu, 0.0)

    mu = torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(mu)
    same = vmap(draw, randomness="same")(mu)
    assert all(torch.equal(row, same[0]) for row in same)
    different = vmap(draw, randomness="different")(mu)
    assert len({tuple(row.tolist()) for row in different}) == 4
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    right = draw(mu)
    torch.manual_seed(3)
    assert torch.equal(compiled(mu), right)
