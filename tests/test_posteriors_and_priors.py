"""Full-covariance posteriors and priors against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from models import B, D, L, mlp
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

import fastvae
from fastvae import CholeskyGaussian, DiagonalGaussian

SIZE = L + L * (L + 1) // 2


def full(device: torch.device, seed: int = 0) -> tuple[CholeskyGaussian, MultivariateNormal]:
    params = torch.randn(B, SIZE, generator=torch.Generator().manual_seed(seed)).double()
    q = CholeskyGaussian.from_params(params.to(device))
    return q, MultivariateNormal(q.mu, scale_tril=q.scale_tril)


def diagonal(device: torch.device, seed: int = 1) -> tuple[DiagonalGaussian, Independent]:
    generator = torch.Generator().manual_seed(seed)
    mu, logvar = torch.randn(2, B, L, generator=generator).double().to(device)
    return DiagonalGaussian(mu, logvar), Independent(Normal(mu, (logvar / 2).exp()), 1)


# ---- Full covariance -----------------------------------------------------------------------------


def test_same_as_multivariate_normal(device: torch.device) -> None:
    ours, theirs = full(device)
    value = torch.randn(4, B, L, dtype=torch.float64, device=device)
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.variance, theirs.variance)
    torch.testing.assert_close(ours.covariance_matrix, theirs.covariance_matrix)
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    pairs = value[:, :1].expand(4, 2, L).unsqueeze(2)  # broadcast against the batch
    torch.testing.assert_close(ours.log_prob(pairs), theirs.log_prob(pairs))


def test_kl_is_that_of_the_derivation(device: torch.device) -> None:
    """1/2 (-ln det Sigma - k + tr Sigma + mu^T mu), and to another Gaussian."""
    ours, theirs = full(device)
    sigma = ours.covariance_matrix
    want = 0.5 * (
        -torch.logdet(sigma)
        - L
        + sigma.diagonal(dim1=-2, dim2=-1).sum(-1)
        + ours.mu.square().sum(-1)
    )
    torch.testing.assert_close(ours.kl(), want)
    prior, _ = diagonal(device)
    other = MultivariateNormal(prior.mu, torch.diag_embed(prior.variance))
    torch.testing.assert_close(ours.kl(prior), kl_divergence(theirs, other))
    # Where the covariance is diagonal, that of DiagonalGaussian.
    narrow = CholeskyGaussian(prior.mu, torch.diag_embed(prior.stddev))
    torch.testing.assert_close(narrow.kl(), prior.kl())
    torch.testing.assert_close(narrow.log_prob(prior.mu + 1), prior.log_prob(prior.mu + 1))
    # Relative accuracy near collapse, where det and trace cancel.
    tiny = 1e-7 * torch.eye(L, dtype=torch.float64, device=device)
    near = CholeskyGaussian(torch.zeros(L).to(tiny), torch.eye(L).to(tiny) + tiny)
    assert near.kl().item() == pytest.approx(L * 1e-14, rel=1e-6)


def test_samples(device: torch.device) -> None:
    ours, _ = full(device)
    z = ours.rsample((50_000,), seed=0)
    assert z.shape == (50_000, B, L)
    centred = z - z.mean(0)
    covariance = torch.einsum("nbi,nbj->bij", centred, centred) / len(z)
    scale = ours.stddev.unsqueeze(-1) * ours.stddev.unsqueeze(-2)
    assert ((covariance - ours.covariance_matrix) / scale).abs().max() < 5 * 1.5 / 50_000**0.5
    assert ((z.mean(0) - ours.mu) / ours.stddev).abs().max() < 5 / 50_000**0.5
    torch.testing.assert_close(ours.rsample((2,), seed=0), z[:2])
    # The noise is the package's own: under L = I, the same as a diagonal Gaussian's.
    q, _ = diagonal(device)
    narrow = CholeskyGaussian(q.mu, torch.diag_embed(q.stddev))
    torch.testing.assert_close(narrow.rsample(seed=3), q.rsample(seed=3), rtol=1e-6, atol=1e-6)


def test_gradients_of_full_covariance(device: torch.device) -> None:
    params = torch.randn(2, SIZE, dtype=torch.float64, device=device, requires_grad=True)

    value = torch.randn(2, L, dtype=torch.float64, device=device)

    def values(params: Tensor) -> tuple[Tensor, ...]:
        q = CholeskyGaussian.from_params(params)
        z, kl = q.rsample_kl(seed=1)
        return z, kl, q.log_prob(value), q.entropy()

    assert gradcheck(values, params)


def test_bad_full_covariance() -> None:
    with pytest.raises(ValueError, match=r"params has shape \[2, 6\]; want a last dimension of"):
        CholeskyGaussian.from_params(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"scale_tril has shape \[2, 2\]; want .* of 3"):
        CholeskyGaussian(torch.zeros(3), torch.eye(2))


def test_a_vae_with_full_covariance(device: torch.device) -> None:
    model, x = mlp(device, params=SIZE, posterior=CholeskyGaussian.from_params)
    output = model(x, seed=0)
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    torch.testing.assert_close(output.kl, model.encode(x).kl())


# ---- Priors --------------------------------------------------------------------------------------


def test_gaussian_priors(device: torch.device) -> None:
    q, their_q = diagonal(device)
    learned = fastvae.LearnedGaussianPrior(L).double().to(device)
    nn.init.normal_(learned.mu)
    nn.init.normal_(learned.logvar)
    network = nn.Linear(2, 2 * L).double().to(device)
    condition = torch.randn(B, 2, dtype=torch.float64, device=device)
    conditional = fastvae.ConditionalGaussian(network)
    mu, logvar = network(condition).chunk(2, 1)
    z = torch.randn(3, B, L, dtype=torch.float64, device=device)
    for prior, c, mean, std in (
        (fastvae.StandardNormal(), None, torch.zeros_like(mu), torch.ones_like(mu)),
        (learned, None, learned.mu.expand(B, L), (learned.logvar / 2).exp().expand(B, L)),
        (conditional, condition, mu, (logvar / 2).exp()),
    ):
        p = Independent(Normal(mean, std), 1)
        torch.testing.assert_close(prior.log_prob(z, c), p.log_prob(z))
        torch.testing.assert_close(prior.kl(q, c), kl_divergence(their_q, p))
        elements = prior.kl(q, c, elementwise=True)
        assert elements.shape == (B, L)
        torch.testing.assert_close(elements.sum(1), kl_divergence(their_q, p))
        sample, kl = prior.rsample_kl(q, c, seed=1)
        torch.testing.assert_close(kl, kl_divergence(their_q, p))
        torch.testing.assert_close(sample, q.rsample(seed=1))
        drawn = prior.sample(torch.zeros_like(mu), c, temperature=0.5, seed=2)
        eps = fastvae.rsample(torch.zeros_like(mu), 0.0, seed=2)
        torch.testing.assert_close(drawn, mean + 0.5 * std * eps)
        torch.testing.assert_close(
            prior.kl(full(device)[0], c),
            kl_divergence(full(device)[1], MultivariateNormal(mean, torch.diag_embed(std**2))),
        )
        assert prior.kl(full(device)[0], c, elementwise=True) is None
    with pytest.raises(ValueError, match="condition is None; want what the prior's network takes"):
        conditional.log_prob(z)


def test_mixture_priors(device: torch.device) -> None:
    torch.manual_seed(0)
    model, x = mlp(device, likelihood=fastvae.Gaussian(0.5))
    mixture = fastvae.MixturePrior(4, L, spread=2.0).double().to(device)
    vamp = fastvae.VampPrior(model.encode, x[:4]).to(x)
    z = torch.randn(3, B, L, dtype=torch.float64, device=device)
    for prior in (mixture, vamp):
        nn.init.normal_(prior.logits)
        parts = prior.components()
        theirs = MixtureSameFamily(
            Categorical(logits=prior.logits), Independent(Normal(parts.mean, parts.stddev), 1)
        )
        torch.testing.assert_close(prior.log_prob(z), theirs.log_prob(z))
        q, _ = diagonal(device)
        assert prior.kl(q) is None
        n = 20_000
        many = DiagonalGaussian(q.mu[:1].expand(n, L), q.logvar[:1].expand(n, L))
        _, kl = prior.rsample_kl(many, seed=0)
        grid = theirs.log_prob(many.rsample(seed=1)) - many.log_prob(many.rsample(seed=1))
        spread = math.hypot(kl.std().item(), grid.std().item()) / math.sqrt(n)
        assert abs(kl.mean().item() + grid.mean().item()) < 5 * spread
        drawn = prior.sample(z.new_zeros(n, L), seed=0)
        error = (drawn.mean(0) - theirs.mean).abs() / theirs.stddev
        assert error.max() < 5 / math.sqrt(n)
        error = (drawn.var(0) / theirs.variance - 1).abs()
        assert error.max() < 0.1
        torch.testing.assert_close(prior.sample(z.new_zeros(3, L), seed=0), drawn[:3])

    model.prior = vamp
    for objective in (fastvae.ELBO(), fastvae.IWAE(3), fastvae.DReG(3)):
        model.objective = objective
        model.zero_grad()
        model(x).loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.sample(7).shape == (7, D)


def test_a_hierarchy_and_conditions(device: torch.device) -> None:
    """Encoder, decoder and prior see the condition, in every method."""

    class Takes(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs + 2, outputs)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.linear(torch.cat([x, c], 1))

    prior = fastvae.ConditionalGaussian(nn.Linear(2, 2 * L))
    model = fastvae.VAE(Takes(D, 2 * L), Takes(L, D), latent_shape=L, prior=prior).to(device)
    x, c = torch.rand(B, D, device=device), torch.rand(B, 2, device=device)
    for objective in (fastvae.ELBO(), fastvae.ELBO(samples=3), fastvae.IWAE(3)):
        model.objective = objective
        output = model(x, c, seed=0)
        assert not torch.allclose(output.loss, model(x, c + 1, seed=0).loss)
        grads = torch.autograd.grad(output.loss, list(model.parameters()))
        assert all(grad.abs().sum() > 0 for grad in grads)
    first = model.objective(model, x[:2], c[:2], seed=0)
    torch.testing.assert_close(first.log_likelihood, model(x, c, seed=0).log_likelihood[:2])
    assert model.sample(B, c).shape == model.reconstruct(x, c).shape == (B, D)
    assert model.log_likelihood(x, 5, c).value.shape == (B,)
    q, p = model.encode(x, c), prior.gaussian(c, torch.float32)
    torch.testing.assert_close(model.prior.kl(q, c), q.kl(p))
