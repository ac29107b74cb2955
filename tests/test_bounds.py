"""Bounds in the fused ops: what `Bound` gives, read and differentiated in the op's own pass.

The table of cases (tests/cases.py) holds every op with a bound of each kind to the reference; here
is what that does not meet: ends, infinite or met exactly, and those who pass a bound on.
"""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate, exact, gradients, same_bits
from cases import DTYPES, SEED
from cases import Op as CaseOp
from torch import Tensor

import fastvae
from fastvae import Bound, DiagonalGaussian

INF = math.inf
KINDS = ("hard", "soft", "straight_through", "tanh")
ENDS = ((-0.5, 1.0), (-0.5, INF), (-INF, 1.0), (-INF, INF), (-30.0, 20.0))
each_kind = pytest.mark.parametrize("kind", KINDS)
CALLS = (("rsample_kl", 2), ("rsample_kl", 4), ("gaussian_log_prob", 3))


def call(name: str, count: int, bound: Bound) -> CaseOp:
    names = ("mu", "logvar", "prior_mu", "prior_logvar")
    arguments = ("x", "mean", "logvar") if name == "gaussian_log_prob" else names[:count]
    return CaseOp(f"{name} of {count}", name, arguments, {"bound": bound})


@each_kind
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize(("name", "count"), CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends(
    kind: str,
    ends: tuple[float, float],
    name: str,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if kind == "tanh" and math.isinf(ends[1] - ends[0]):
        pytest.skip("has finite ends")
    if kind == "tanh" and ends == (-30.0, 20.0):
        pytest.skip("-5 + 25 tanh(1 / 5) has no more digits around 0 than 5 has")
    op = call(name, count, Bound(*ends, kind))
    tensors = op.inputs((4, 70), dtype, device=device)
    assert_accurate(op(fastvae, tensors), exact(op, tensors), dtype)
    grads, upstream = gradients(op, tensors)
    assert_accurate(grads, exact(op, tensors, upstream=upstream), dtype)


def test_another_bound_is_told_apart(device: torch.device) -> None:
    """The negative control."""
    op, other = (call("rsample_kl", 2, Bound(-0.5, high)) for high in (1.0, 1.001))
    tensors = op.inputs((4, 70), device=device)
    with pytest.raises(AssertionError):
        assert_accurate(op(fastvae, tensors), exact(other, tensors), torch.float32)


def test_the_gradient_at_the_ends_is_clamps(device: torch.device) -> None:
    x = torch.tensor([-1.5, -0.5, 0.3, 1.0, 2.0, INF, -INF, math.nan], device=device)
    leaf = x.clone().requires_grad_()
    kl = fastvae.kl_divergence(torch.zeros_like(x), leaf, bound=Bound(-0.5, 1.0), event_ndim=0)
    (grad,) = torch.autograd.grad(kl[:-1].sum(), leaf)
    clamped = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(clamped.clamp(-0.5, 1.0).sum(), clamped)
    torch.testing.assert_close(grad, slope * torch.expm1(x.clamp(-0.5, 1.0)).nan_to_num() / 2)
    assert slope.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert kl[-1].isnan()


@each_kind
def test_infinite_log_variances_end_at_the_bound(kind: str, device: torch.device) -> None:
    x = torch.tensor([INF, -INF], device=device)
    kl = fastvae.kl_divergence(torch.zeros_like(x), x, bound=Bound(-4, 2, kind), event_ndim=0)
    ends = torch.tensor([2.0, -4.0], device=device)
    right = fastvae.kl_divergence(torch.zeros_like(x), ends, event_ndim=0)
    torch.testing.assert_close(kl, right, rtol=1e-2 if kind == "soft" else 1e-6, atol=0)


def test_a_soft_bound_far_away_keeps_every_digit(device: torch.device) -> None:
    """high - softplus(high - lv) in float32 would round lv to the digits of high."""
    logvar = torch.tensor([1e-4, -3e-5], device=device)
    args = torch.zeros_like(logvar), logvar
    near = fastvae.kl_divergence(*args, bound=Bound(-30, 20, "soft"), event_ndim=0)
    right = fastvae.kl_divergence(*(t.double() for t in args), event_ndim=0)
    shift = math.exp(-20)  # what a soft bound does at lv = 0
    double = fastvae.kl_divergence(args[0].double(), logvar.double() - shift, event_ndim=0)
    torch.testing.assert_close(near.double(), double, rtol=1e-4, atol=0)
    torch.testing.assert_close(near.double(), right, rtol=1e-3, atol=0)


@each_kind
def test_the_prior_is_not_bounded(kind: str, device: torch.device) -> None:
    mu, logvar = torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device)
    prior = torch.full_like(logvar, 5.0)
    bound = Bound(-20, 2, kind)
    ours = fastvae.kl_divergence(mu, logvar, mu, prior, bound=bound)
    torch.testing.assert_close(ours, fastvae.kl_divergence(mu, bound(logvar), mu, prior))


@each_kind
def test_a_number_is_bounded(kind: str, device: torch.device) -> None:
    x = torch.linspace(-1, 1, 6, device=device).view(2, 3)
    bound = Bound(-6, 6 if kind == "tanh" else INF, kind)
    ours = fastvae.gaussian_log_prob(x, 0.0, -9.0, bound=bound)
    right = fastvae.gaussian_log_prob(x, 0.0, bound(torch.tensor(-9.0, device=device)))
    torch.testing.assert_close(ours, right)


@each_kind
def test_a_final_loss(kind: str, device: torch.device) -> None:
    op = call("gaussian_log_prob", 3, Bound(-0.5, 1.0, kind))
    tensors = op.inputs((4, 70), device=device)
    leaves = [t.requires_grad_() for t in tensors]
    loss = fastvae.gaussian_nll_loss(*leaves, **op.options)
    right = -op(fastvae, leaves)[0].mean()
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves)
    )


# ---- Those who pass a bound on -------------------------------------------------------------------


def results(q: DiagonalGaussian, p: DiagonalGaussian) -> list[Tensor]:
    x = torch.linspace(-1, 1, 20, device=q.mu.device, dtype=q.mu.dtype).view(4, 5)
    return [
        q.rsample(seed=SEED), q.rsample((2,), seed=SEED), q.kl(), q.kl(p), p.kl(q),
        *q.rsample_kl(seed=SEED), *q.rsample_kl(p, seed=SEED), q.log_prob(x), q.entropy(), q.stddev,
    ]  # fmt: skip


@each_kind
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_distributions(kind: str, backend: str, device: torch.device) -> None:
    """Packed or not, a distribution with a bound is that of the bounded log-variance."""
    bound = Bound(-0.5, 1.0, kind)
    generator = torch.Generator().manual_seed(0)
    params = 2 * torch.randn(4, 10, generator=generator, dtype=torch.float64)
    leaf = params.to(device).requires_grad_()
    mu, logvar = leaf.chunk(2, 1)
    p = DiagonalGaussian(mu.detach() + 1, logvar.detach() - 1)
    ways = [
        DiagonalGaussian(mu, bound(logvar)),
        DiagonalGaussian(mu, logvar, bound=bound),
        DiagonalGaussian.from_params(leaf, bound=bound),
        DiagonalGaussian(mu, logvar, bound=bound).expand((4,)),
    ]
    found = []
    with fastvae.use_backend(backend):
        for q in ways:
            assert torch.equal(q.logvar, bound(logvar))
            values = results(q, p)
            (grad,) = torch.autograd.grad(sum((y * y).sum() for y in values), leaf)
            found.append([*values, grad])
        for other in found[1:]:
            for ours, right in zip(other, found[0], strict=True):
                torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)
        constant = ways[1].detach()
    assert not constant.logvar.requires_grad
    assert torch.equal(constant.logvar, bound(logvar))


@each_kind
def test_halves_of_one_tensor_and_two_tensors_give_the_same_bits(
    kind: str, device: torch.device
) -> None:
    bound = Bound(-0.5, 1.0, kind)
    params = torch.randn(4, 10, device=device, requires_grad=True)
    q = DiagonalGaussian.from_params(params, bound=bound)
    z, kl = q.rsample_kl(seed=SEED)
    assert z.grad_fn.next_functions[0][0].variable is params  # no chunk and no clamp between
    right = fastvae.rsample_kl(*params.chunk(2, 1), bound=bound, seed=SEED)
    assert same_bits(z, right[0])
    assert same_bits(kl, right[1])


def test_models_and_likelihoods_bound_in_the_kernels(device: torch.device) -> None:
    if not fastvae.backend.native_enabled():
        pytest.skip("needs the binary")
    bound = Bound(-0.5, 1.0)
    model = fastvae.VAE(
        torch.nn.Linear(6, 8),
        torch.nn.Linear(4, 12),
        likelihood=fastvae.HeteroscedasticGaussian(bound),
        bound=bound,
    ).to(device)
    x = torch.randn(3, 6, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).loss.backward()
    assert not [event.key for event in profile.key_averages() if "clamp" in event.key]
