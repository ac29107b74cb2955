"""KL divergences with the distributions of PyTorch, both ways, against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Cauchy,
    ContinuousBernoulli,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    Uniform,
    kl_divergence,
)

from fastvae import CholeskyGaussian, DiagonalGaussian

B, K = 4, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def diagonal(event_ndim: int | None = None, seed: int = 0) -> DiagonalGaussian:
    return DiagonalGaussian(*drawn(2, B, K, seed=seed), event_ndim=event_ndim)


def normal(seed: int = 1) -> Normal:
    loc, log_scale = drawn(2, B, K, seed=seed)
    return Normal(loc, log_scale.exp())


def full(seed: int = 2) -> CholeskyGaussian:
    return CholeskyGaussian.from_params(drawn(B, K * (K + 3) // 2, seed=seed))


def theirs(g: Distribution) -> MultivariateNormal:
    """Any of the Gaussians as PyTorch has it, with its covariance."""
    if isinstance(g, Independent):
        g = g.base_dist
    if isinstance(g, CholeskyGaussian):
        return MultivariateNormal(g.mu, scale_tril=g.scale_tril)
    if isinstance(g, Normal | DiagonalGaussian):
        return MultivariateNormal(g.mean, torch.diag_embed(g.variance))
    return MultivariateNormal(g.loc, g.covariance_matrix)


GAUSSIANS: dict[str, Callable[[], Distribution]] = {
    "diagonal": lambda: diagonal(seed=3),
    "full": lambda: full(seed=10),
    "Normal": normal,
    "one Normal for all": lambda: Normal(drawn()[()], 1.5),
    "Independent": lambda: Independent(normal(), 1),
    "MultivariateNormal": lambda: theirs(full(seed=4)),
    "low rank": lambda: LowRankMultivariateNormal(
        drawn(B, K), drawn(B, K, 1, seed=6), drawn(B, K, seed=7).exp()
    ),
}


@pytest.mark.parametrize("ours", [diagonal, full], ids=["diagonal", "full"])
@pytest.mark.parametrize("name", GAUSSIANS)
def test_gaussians(ours: Callable[[], Distribution], name: str) -> None:
    q, p = ours(), GAUSSIANS[name]()
    right = p.expand((B, K)) if name == "one Normal for all" else p
    for found, want in (
        (kl_divergence(q, p), kl_divergence(theirs(q), theirs(right))),
        (kl_divergence(p, q), kl_divergence(theirs(right), theirs(q))),
    ):
        assert found.shape == (B,)
        torch.testing.assert_close(found, want)
        assert (found[0] - want[1]).abs() > 1e-3  # what this could not tell apart


ELEMENTS = {
    "Laplace": Laplace(drawn(K, seed=4), 0.7),
    "Gumbel": Gumbel(drawn(K, seed=4), 1.4),
    "Uniform": Uniform(drawn(K, seed=4) - 3, drawn(K, seed=5).exp()),
    "Beta": Beta(torch.tensor(2.0).double(), 3.0),
    "ContinuousBernoulli": ContinuousBernoulli(torch.tensor(0.3).double()),
    "Exponential": Exponential(drawn(K, seed=5).exp()),
    "Gamma": Gamma(drawn(K, seed=5).exp(), 2.0),
    "Pareto": Pareto(torch.tensor(1.0).double(), 3.0),
}


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("event_ndim", [0, 1, 2])
def test_one_dimensional_partners(name: str, event_ndim: int) -> None:
    q, p = diagonal(event_ndim), ELEMENTS[name]
    elements = Normal(q.mean, q.stddev)
    wide = p.expand((B, K))
    dims = tuple(range(-event_ndim, 0))
    partners = [p, wide]
    if event_ndim:
        partners.append(Independent(wide, event_ndim))
    for partner in partners:
        for found, want in (
            (kl_divergence(q, partner), kl_divergence(elements, wide)),
            (kl_divergence(partner, q), kl_divergence(wide, elements)),
        ):
            torch.testing.assert_close(found, want.sum(dims) if dims else want)


def test_a_partner_that_torch_does_not_know_with_a_normal() -> None:
    with pytest.raises(NotImplementedError):
        kl_divergence(Normal(0.0, 1.0), Cauchy(0.0, 1.0))
    with pytest.raises(NotImplementedError):
        kl_divergence(diagonal(), Cauchy(0.0, 1.0))


def test_the_standard_normal_is_the_default_prior() -> None:
    for q in (diagonal(), diagonal(0), full()):
        torch.testing.assert_close(kl_divergence(q, Normal(0.0, 1.0)), q.kl())
    assert (kl_divergence(diagonal(), Normal(0.1, 1.0)) - diagonal().kl()).abs().min() > 1e-3


def test_near_collapse_between_full_covariances() -> None:
    """Where PyTorch's own formula has no digit left, in float32."""
    mu, scale = torch.zeros(B, K), torch.linalg.cholesky(torch.eye(K) + 0.5).expand(B, K, K)
    q, p = CholeskyGaussian(mu + 1e-4, scale), CholeskyGaussian(mu, scale)
    want = kl_divergence(
        MultivariateNormal(q.mu.double(), scale_tril=scale.double()),
        MultivariateNormal(p.mu.double(), scale_tril=scale.double()),
    )
    torch.testing.assert_close(q.kl(p).double(), want, rtol=1e-5, atol=0)
    their_own = kl_divergence(theirs(q), theirs(p)).double()
    assert ((their_own - want) / want).abs().max() > 0.1
    assert q.kl(q).eq(0).all()


def test_gradients_reach_both(device: torch.device) -> None:
    leaves = [drawn(B, K * (K + 3) // 2, seed=k).to(device).requires_grad_() for k in (8, 9)]
    q, p = map(CholeskyGaussian.from_params, leaves)
    ours = torch.autograd.grad(kl_divergence(q, p).sum(), leaves)
    q, p = map(CholeskyGaussian.from_params, leaves)
    right = torch.autograd.grad(kl_divergence(theirs(q), theirs(p)).sum(), leaves)
    torch.testing.assert_close(ours, right)
    mu, scale = drawn(B, K).requires_grad_(), drawn(K, seed=9).exp().requires_grad_()
    ours = torch.autograd.grad(kl_divergence(diagonal(), Normal(mu, scale)).sum(), (mu, scale))
    right = torch.autograd.grad(
        kl_divergence(
            Independent(diagonal().base_dist, 1), Independent(Normal(mu, scale), 1)
        ).sum(),
        (mu, scale),
    )
    torch.testing.assert_close(ours, right)


def test_bad_pairs() -> None:
    q = diagonal()
    for call, kind, message in (
        (lambda: kl_divergence(q, Independent(normal(), 2)), ValueError,
         r"^an Independent has 2 event dimensions; want .* DiagonalGaussian beside it, 1$"),
        (lambda: kl_divergence(Independent(normal(), 2), full()), ValueError,
         r"want those of the CholeskyGaussian beside it, 1$"),
        (lambda: kl_divergence(q, Independent(theirs(full()), 1)), NotImplementedError,
         r"^no KL divergence with an Independent of MultivariateNormal"),
        (lambda: kl_divergence(diagonal(2), theirs(full())), ValueError,
         r"^a DiagonalGaussian has event_ndim 2; want 1"),
        (lambda: kl_divergence(diagonal(0), full()), ValueError, r"has event_ndim 0; want 1"),
        (lambda: kl_divergence(full(), diagonal(0)), ValueError, r"^prior has event_ndim 0"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_give_float32(half: torch.dtype) -> None:
    mu, logvar = drawn(2, B, K).to(half)
    q, right = DiagonalGaussian(mu, logvar), DiagonalGaussian(mu.double(), logvar.double())
    for p in (Normal(0.5, 2.0), full(seed=10), Laplace(torch.zeros(K, dtype=half), 0.5)):
        for found, want in (
            (kl_divergence(q, p), kl_divergence(right, p)),
            (kl_divergence(p, q), kl_divergence(p, right)),
        ):
            wide = torch.float64 if isinstance(p, CholeskyGaussian) else torch.float32
            assert found.dtype == wide
            torch.testing.assert_close(found.double(), want.double(), rtol=0.02, atol=0.02)
