"""Objectives and penalties against plain autograd, and their bounds against exact answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import B, FactorAnalysis, L, mlp
from torch import Tensor
from torch.distributions import Independent, Normal

import fastvae
from fastvae import ELBO, IWAE, VAE, Beta, Capacity, Cyclical, DReG, FreeBits, Linear, reference
from fastvae import StickingTheLanding as STL

K = 7
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the kernels' float32 normals, and the reference's


def plain_log_weights(
    model: VAE, x: Tensor, k: int, *, stop: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, ln p(x|z), ln p(z), ln q(z|x) in plain PyTorch with the noise of seed 5."""
    mu, logvar = model.encoder(x).chunk(2, 1)
    seed = torch.tensor(5, device=x.device)
    eps = reference.noise(seed, mu.shape, sample_shape=(k,)).double()
    z = mu + (logvar / 2).exp() * eps
    if stop:
        mu, logvar = mu.detach(), logvar.detach()
    log_q = Independent(Normal(mu, (logvar / 2).exp()), 1).log_prob(z)
    p = model.prior.gaussian(None, z.dtype)
    prior = (torch.zeros_like(mu), 1.0) if p is None else (p.mu, (p.logvar / 2).exp())
    log_p = Independent(Normal(*prior), 1).log_prob(z)
    likelihood = Independent(Normal(model.decoder(z), model.likelihood.sigma), 1)
    return z, likelihood.log_prob(x), log_p, log_q


def gradients(loss: Tensor, model: VAE) -> list[Tensor]:
    learned = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, learned, retain_graph=True))


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.fixture
def setting(device: torch.device) -> tuple[VAE, Tensor]:
    return mlp(device, likelihood=fastvae.Gaussian(0.5))


@pytest.fixture(params=["N(0, I)", "learned", "given"])
def with_prior(setting: tuple[VAE, Tensor], request: pytest.FixtureRequest) -> tuple[VAE, Tensor]:
    """A model whose prior is standard, has parameters to learn, or has fixed ones."""
    model, x = setting
    if request.param != "N(0, I)":
        model.prior = fastvae.LearnedGaussianPrior(L).to(x)
        for p in model.prior.parameters():
            torch.nn.init.normal_(p, std=0.5)
            p.requires_grad_(request.param == "learned")
    return model, x


def test_monte_carlo_elbo(with_prior: tuple[VAE, Tensor]) -> None:
    model, x = with_prior
    z, log_px, log_p, log_q = plain_log_weights(model, x, K)
    model.objective = ELBO(Beta(0.3), samples=K, kl="monte_carlo")
    output = model(x, seed=5)
    torch.testing.assert_close(output.z, z, **CLOSE)
    torch.testing.assert_close(output.kl, (log_q - log_p).mean(0), **CLOSE)
    torch.testing.assert_close(output.bound, (log_px + log_p - log_q).mean(0), **CLOSE)
    loss = (0.3 * (log_q - log_p) - log_px).mean()
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    assert_same(gradients(output.loss, model), gradients(loss, model))
    model.objective = ELBO(Beta(0.3), samples=1, kl="monte_carlo")
    assert model(x, seed=5).z.shape == (B, L)


def test_analytic_elbo_of_several_samples(setting: tuple[VAE, Tensor]) -> None:
    model, x = setting
    _, log_px, _, _ = plain_log_weights(model, x, K)
    kl = model.encode(x).kl()
    model.objective = ELBO(samples=K)
    output = model(x, seed=5)
    loss = (kl - log_px.mean(0)).mean()
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    torch.testing.assert_close(output.bound, log_px.mean(0) - kl, **CLOSE)
    assert_same(gradients(output.loss, model), gradients(loss, model))


def test_sticking_the_landing(with_prior: tuple[VAE, Tensor]) -> None:
    model, x = with_prior
    _, log_px, log_p, log_q = plain_log_weights(model, x, K, stop=True)
    loss = -(log_px + log_p - log_q).mean()
    model.objective = STL(K)
    output = model(x, seed=5)
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    assert_same(gradients(output.loss, model), gradients(loss, model))
    model.objective = ELBO(samples=K, kl="monte_carlo")
    with pytest.raises(AssertionError):
        assert_same(gradients(model(x, seed=5).loss, model), gradients(loss, model))


def test_iwae(with_prior: tuple[VAE, Tensor]) -> None:
    model, x = with_prior
    _, log_px, log_p, log_q = plain_log_weights(model, x, K)
    loss = -(torch.logsumexp(log_px + log_p - log_q, 0) - math.log(K)).mean()
    model.objective = IWAE(K)
    output = model(x, seed=5)
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    torch.testing.assert_close(output.bound.mean(), -loss, **CLOSE)
    assert_same(gradients(output.loss, model), gradients(loss, model))


def test_dreg(with_prior: tuple[VAE, Tensor]) -> None:
    """The encoder's gradient by the paper's sum, the decoder's and the prior's that of IWAE."""
    model, x = with_prior
    _, log_px, log_p, log_q = plain_log_weights(model, x, K)
    log_w = log_px + log_p - log_q
    iwae = gradients(-(torch.logsumexp(log_w, 0) - math.log(K)).mean(), model)
    z, log_px, log_p, log_q = plain_log_weights(model, x, K, stop=True)
    log_w = log_px + log_p - log_q
    v = torch.softmax(log_w, 0).detach()
    (by_z,) = torch.autograd.grad(log_w.sum(), z, retain_graph=True)
    encoder = list(model.encoder.parameters())
    paper = torch.autograd.grad(z, encoder, grad_outputs=-(v**2)[..., None] * by_z / B)
    model.objective = DReG(K)
    output = model(x, seed=5)
    assert_same(gradients(output.loss, model), [*paper, *iwae[len(encoder) :]])
    with pytest.raises(AssertionError):
        assert_same(gradients(output.loss, model), iwae)


def test_dreg_estimates_what_iwae_estimates(device: torch.device) -> None:
    """Their means over many draws agree, with less spread."""
    toy = FactorAnalysis(device, sigma=1.0, n=1)
    model = toy.model(exact=False)
    many = toy.x.expand(4000, -1)
    means, spreads = [], []
    for objective in (IWAE(4), DReG(4)):
        bias = model.encoder.bias.detach().expand(4000, -1).clone().requires_grad_()
        encoded = torch.nn.functional.linear(many, model.encoder.weight) + bias
        output = objective(_Encoded(model, encoded), many, seed=0)
        (grad,) = torch.autograd.grad(output.loss * len(many), bias)  # of each draw
        means.append(grad.mean(0))
        spreads.append(grad.std(0))
    error = (means[0] - means[1]).abs() / ((spreads[0] + spreads[1]) / math.sqrt(4000))
    assert error.max() < 4
    assert means[0].abs().max() > 20 * spreads[1].max() / math.sqrt(4000)
    assert (spreads[1] < 0.6 * spreads[0]).all()


class _Encoded:
    """A model whose encoder's output is known."""

    def __init__(self, model: VAE, params: Tensor) -> None:
        self.model, self.params = model, params

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def encode(self, x: Tensor, condition: object = None) -> fastvae.CholeskyGaussian:
        return fastvae.CholeskyGaussian.from_params(self.params)


def test_the_exact_posterior(device: torch.device) -> None:
    """Every weight is p(x): every bound is exact from one sample, and path gradients are 0."""
    toy = FactorAnalysis(device)
    for objective in (STL(1), STL(3), IWAE(1), IWAE(3), DReG(3), ELBO(kl="monte_carlo")):
        model = toy.model(objective=objective)
        output = model(toy.x)
        torch.testing.assert_close(output.bound, toy.log_prob, rtol=1e-9, atol=1e-9)
        grads = torch.autograd.grad(output.loss, list(model.encoder.parameters()))
        largest = max(grad.abs().max().item() for grad in grads)
        if isinstance(objective, STL | DReG):
            assert largest < 1e-9
        else:
            assert largest > 1e-3


def test_bounds_rise_with_k(device: torch.device) -> None:
    toy = FactorAnalysis(device, n=200)
    model = toy.model(exact=False)
    bounds = []
    for k in (1, 5, 50, 500):
        model.objective = IWAE(k)
        with torch.no_grad():
            bounds.append(model(toy.x, seed=0).bound.mean().item())
    exact = toy.log_prob.mean().item()
    assert bounds == sorted(bounds)
    assert exact - bounds[0] > 10 * (exact - bounds[-1]) > 0
    # The first is the ELBO, below by KL(q || p(z | x)).
    q = model.encode(toy.x)
    p = torch.distributions.MultivariateNormal(toy.x @ toy.gain.T, toy.covariance)
    gap = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(q.mu, scale_tril=q.scale_tril), p
    )
    model.objective = ELBO(samples=400)
    with torch.no_grad():
        elbo = model(toy.x, seed=0).bound.mean().item()
    assert elbo == pytest.approx(exact - gap.mean().item(), abs=0.02 * gap.mean().item())


@pytest.mark.parametrize("posterior", [None, fastvae.CholeskyGaussian.from_params])
def test_autocast(device: torch.device, posterior: object) -> None:
    size = 2 * L if posterior is None else L * (L + 3) // 2
    model, x = mlp(device, params=size, posterior=posterior)
    model, x = model.float(), x.float()
    for objective in (ELBO(), ELBO(samples=2), STL(2), IWAE(5), DReG(5)):
        model.objective = objective
        expected = model(x, seed=0).loss
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(x, seed=0).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
        loss.backward()


# ---- Penalties -----------------------------------------------------------------------------------


def test_penalties() -> None:
    kl = torch.tensor([[0.1, 2.0, 0.3, 1.0], [0.5, 0.0, 0.1, 3.0]], dtype=torch.float64)
    total = kl.sum(1)
    assert Beta(2.5)(total).item() == pytest.approx(2.5 * total.mean().item())
    assert Capacity(4.0, 3.0)(total).item() == pytest.approx(3 * abs(3.5 - 4))
    assert Capacity(3.45, 3.0, per_example=True)(total).item() == pytest.approx(3 * 0.1)
    assert Capacity(0.0, 1.0)(total).item() == pytest.approx(Beta()(total).item())
    means = (0.3, 1.0, 0.2, 2.0)
    for nats in (0.0, 0.25, 1.5, 10.0):
        want = sum(max(nats, mean) for mean in means)
        assert FreeBits(nats)(kl).item() == pytest.approx(want)
        want = sum(max(nats, value) for value in kl.flatten().tolist()) / 2
        assert FreeBits(nats, per_example=True, beta=2.0)(kl).item() == pytest.approx(2 * want)
        want = max(nats, 1.3) + max(nats, 2.2)
        assert FreeBits(nats, groups=2)(kl).item() == pytest.approx(want)
    assert FreeBits(0.0, groups=1)(kl).item() == pytest.approx(Beta()(total).item())
    with pytest.raises(ValueError, match="groups is 3; want a divisor of the latent's size, 4"):
        FreeBits(0.1, groups=3)(kl)


@pytest.mark.parametrize("penalty", [FreeBits(0.4), FreeBits(0.4, per_example=True), Capacity(2.0)])
def test_penalties_in_the_elbo(setting: tuple[VAE, Tensor], penalty: object) -> None:
    model, x = setting
    mu, logvar = model.encoder(x).chunk(2, 1)
    elements = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    if isinstance(penalty, Capacity):
        want = 10 * (elements.sum(1).mean() - 2).abs()
    elif penalty.per_example:
        want = elements.clamp(min=0.4).sum(1).mean()
    else:
        want = elements.mean(0).clamp(min=0.4).sum()
    _, log_px, _, _ = plain_log_weights(model, x, 1)
    model.objective = ELBO(penalty)
    output = model(x, seed=5)
    torch.testing.assert_close(output.loss, want - log_px.mean(), **CLOSE)
    torch.testing.assert_close(output.kl, elements.sum(1), **CLOSE)
    assert_same(gradients(output.loss, model), gradients(want - log_px.mean(), model))


def test_schedules() -> None:
    warmup = Linear(2.0, 4)
    assert [warmup(step) for step in (0, 1, 2, 4, 100)] == [0.0, 0.5, 1.0, 2.0, 2.0]
    assert Linear(2.0, 0)(0) == 2.0
    assert Linear(1.0, 2, start=3.0)(1) == 2.0
    cyclical = Cyclical(1.0, period=8, cycles=2)
    assert [cyclical(step) for step in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [cyclical(step) for step in range(8, 16)] == [cyclical(step) for step in range(8)]
    assert all(cyclical(step) == 1 for step in range(16, 40))


# ---- Wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Beta(-1.0), "beta is -1.0; want a number of at least 0"),
        (lambda: Beta(math.nan), "beta is nan; want"),
        (lambda: Capacity(-1.0), "capacity is -1.0; want"),
        (lambda: Capacity(1.0, math.inf), "gamma is inf; want"),
        (lambda: FreeBits(-0.1), "nats is -0.1; want"),
        (lambda: ELBO(samples=0), "samples is 0; want at least 1"),
        (lambda: ELBO(kl="exact"), "kl is 'exact'; want 'analytic' or 'monte_carlo'"),
        (lambda: IWAE(0), "samples is 0; want at least 1"),
        (lambda: DReG(-1), "samples is -1; want at least 1"),
        (lambda: STL(0), "samples is 0; want at least 1"),
    ],
)
def test_bad_options(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_free_bits_need_the_kl_of_each_dimension(device: torch.device) -> None:
    toy = FactorAnalysis(device)
    with pytest.raises(ValueError, match="penalty is a FreeBits, which needs the KL of each"):
        toy.model(objective=ELBO(FreeBits(0.1)))(toy.x)


@pytest.mark.parametrize("module", [fastvae, reference], ids=["native", "reference"])
def test_no_gradient_of_a_log_ratio_passes_through_the_z_beside_it(module: Any) -> None:
    """DReG scales both on their way to q, each once."""
    mu, logvar = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    z, log_ratio = module.rsample_log_ratio(mu, logvar, path_derivative=True, seed=0)
    (through_z,) = torch.autograd.grad(log_ratio.sum(), z, retain_graph=True, allow_unused=True)
    assert through_z is None
    assert torch.autograd.grad(log_ratio.sum(), mu)[0].abs().min() > 0
