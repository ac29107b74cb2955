"""`VAE.report` against exact answers, and the VAE's ways to make data."""

from __future__ import annotations

import json
import math

import pytest
import torch
from models import B, D, FactorAnalysis, L, mlp

import fastvae


def test_nothing_to_report_of_is_an_error() -> None:
    model = fastvae.VAE(torch.nn.Linear(3, 4), torch.nn.Linear(2, 3), latent_shape=2)
    with pytest.raises(ValueError, match="samples is 0; want at least 1"):
        model.report(torch.rand(5, 3), samples=0)
    with pytest.raises(ValueError, match="x has no examples"):
        model.report(torch.rand(0, 3))


def test_report(device: torch.device) -> None:
    toy = FactorAnalysis(device, sigma=1.0, n=1500)
    model = toy.model()
    report = model.report(toy.x, samples=8, batch_size=400, seed=0)
    rate = model.encode(toy.x).kl().mean().item()
    assert report.examples == 1500
    assert report.rate == pytest.approx(rate, rel=1e-9)
    assert report.elbo == pytest.approx(toy.log_prob.mean().item(), abs=0.05)
    assert report.elbo == pytest.approx(-report.rate - report.distortion)
    assert report.bits == pytest.approx(-report.elbo / math.log(2))
    assert report.bits_per_dim == pytest.approx(report.bits / D)
    assert report.active_units == L
    assert report.kl_per_dim == []  # a full covariance has none
    # x and z are jointly Gaussian: I(x; z) = 1/2 ln det Cov(z) / det Cov(z | x), Cov(z) = I; and
    # q(z) is p(z), up to the finite data set.
    exact = -0.5 * torch.logdet(toy.covariance).item()
    assert report.mutual_information == pytest.approx(exact, abs=0.15)
    assert abs(report.marginal_kl) < 0.15
    assert report.mutual_information + report.marginal_kl == pytest.approx(report.rate, abs=0.15)
    assert json.loads(json.dumps(report.as_dict()))["elbo"] == report.elbo
    assert f"{report.elbo:.3f} nats" in str(report)
    again = model.report(toy.x, samples=8, batch_size=400, seed=0)
    assert again == report


def test_report_of_each_dimension(device: torch.device) -> None:
    model, x = mlp(device)
    with torch.no_grad():  # the last unit is the prior, whatever x is
        model.encoder[-1].weight[[L - 1, 2 * L - 1]] = 0
        model.encoder[-1].bias[[L - 1, 2 * L - 1]] = 0
        model.encoder[-1].weight[: L - 1] *= 5
    report = model.report(x, batch_size=2, seed=0)
    torch.testing.assert_close(
        torch.tensor(report.kl_per_dim, dtype=torch.float64),
        model.prior.kl(model.encode(x), elementwise=True).mean(0).cpu(),
    )
    assert sum(report.kl_per_dim) == pytest.approx(report.rate)
    assert report.kl_per_dim[-1] == pytest.approx(0, abs=1e-12)
    assert report.active_units == L - 1
    variance = model.encode(x).mean.var(0, correction=0)
    torch.testing.assert_close(
        torch.tensor(report.mean_variance, dtype=torch.float64), variance.cpu()
    )
    # With a mixture prior, the rate is estimated.
    model.prior = fastvae.MixturePrior(1, L, spread=0.0).double().to(device)
    estimated = model.report(x, samples=2000, seed=0)
    assert estimated.rate == pytest.approx(report.rate, abs=0.1)
    assert estimated.kl_per_dim == []
    # A posterior shifted off the prior shows in the marginal KL.
    with torch.no_grad():
        model.encoder[-1].bias[L - 1] = 3.0
    assert model.report(x, seed=0).marginal_kl > report.marginal_kl + 2


def test_what_a_model_makes(device: torch.device) -> None:
    model, x = mlp(device, likelihood=fastvae.Bernoulli())
    assert ((model.reconstruct(x) > 0) & (model.reconstruct(x) < 1)).all()
    torch.testing.assert_close(model.reconstruct(x), model.decoder(model.encode(x).mean).sigmoid())
    path = model.interpolate(x, x.flip(0), 5)
    assert path.shape == (5, B, D)
    torch.testing.assert_close(path[0], model.reconstruct(x))
    torch.testing.assert_close(path[-1], model.reconstruct(x.flip(0)))
    middle = (model.encode(x).mean + model.encode(x.flip(0)).mean) / 2
    torch.testing.assert_close(path[2], model.decoder(middle).sigmoid())
    with pytest.raises(ValueError, match="steps is 1; want at least 2"):
        model.interpolate(x, x, 1)

    z = model.sample_latent(1000, seed=0)
    torch.testing.assert_close(model.sample_latent(1000, temperature=0.3, seed=0), 0.3 * z)
    torch.testing.assert_close(model.sample(3, seed=0), model.decoder(z[:3]).sigmoid())
    frozen = model.sample(4, temperature=0.0)
    torch.testing.assert_close(frozen, frozen[:1].expand(4, D))
    noisy = model.sample(2000, noise=True, seed=0)
    assert set(noisy.unique().tolist()) == {0.0, 1.0}
    assert (noisy.mean(0) - model.sample(2000, seed=0).mean(0)).abs().max() < 0.06


def test_the_encoders_variance_can_be_bounded(device: torch.device) -> None:
    model, x = mlp(device, bound=fastvae.Bound(-0.1, 0.1))
    with torch.no_grad():
        model.encoder[-1].weight *= 100
    q = model.encode(x)
    assert (q.logvar.abs() <= 0.1).all()
    _, logvar = model.encoder(x).chunk(2, 1)
    torch.testing.assert_close(q.logvar, logvar.clamp(-0.1, 0.1))
    model(x).loss.backward()
