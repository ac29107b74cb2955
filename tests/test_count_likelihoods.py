"""Likelihoods of counts: totals, dispersions, samples, and models that use them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import seeded
from torch import Tensor, nn

import fastvae
from fastvae.models.likelihoods.counts import _gamma, _poisson

pytestmark = pytest.mark.usefixtures("on_device")

scipy_stats = pytest.importorskip("scipy.stats")
G = 7


def counts(n: int = 5) -> Tensor:
    return torch.poisson(torch.full((n, G), 2.0), seeded(0))


def test_an_observed_total_is_shared_out() -> None:
    x, f = counts(), torch.randn(5, G)
    want = torch.softmax(f, 1) * x.sum(1, keepdim=True)
    for likelihood in (
        fastvae.Poisson("observed"),
        fastvae.NegativeBinomial(G, library="observed"),
    ):
        torch.testing.assert_close(likelihood.mean(f, library=x.sum(1)), want)
        torch.testing.assert_close(likelihood.mean(f).sum(1), torch.full((5,), 1e4))
        torch.testing.assert_close(
            likelihood.log_prob(x, f), likelihood.log_prob(x, f, library=x.sum(1))
        )
        other = likelihood.log_prob(x, f, library=2 * x.sum(1))
        assert not torch.allclose(other, likelihood.log_prob(x, f))
    torch.testing.assert_close(
        fastvae.Poisson("observed").log_prob(x, f), fastvae.poisson_log_prob(x, want)
    )
    empty = torch.zeros(1, G)  # an example without counts
    f = torch.randn(1, G, requires_grad=True)
    value = fastvae.NegativeBinomial(G, library="observed").log_prob(empty, f)
    value.sum().backward()
    assert value.item() == 0
    assert not f.grad.any()


def test_whose_dispersion_it_is() -> None:
    x, f = counts(), torch.randn(5, G)
    groups = fastvae.NegativeBinomial(G, dispersion="group", groups=3)
    nn.init.normal_(groups.log_theta)
    group = torch.tensor([0, 2, 1, 1, 0])
    value = groups.log_prob(x, f, **groups.context(group))
    want = fastvae.negative_binomial_log_prob(x, f.exp(), groups.log_theta.exp()[group])
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(value, groups.log_prob(x, f, **groups.context({"group": group})))
    (grad,) = torch.autograd.grad(value[0], groups.log_theta)
    assert grad[0].any()
    assert not grad[1:].any()
    with pytest.raises(ValueError, match="group is None; want the examples' indices"):
        groups.log_prob(x, f)
    cells = fastvae.NegativeBinomial(dispersion="cell")
    s = torch.randn(5, G)
    want = fastvae.negative_binomial_log_prob(x, f.exp(), s.exp())
    torch.testing.assert_close(cells.log_prob(x, torch.cat([f, s], 1)), want)
    inflated = fastvae.ZeroInflatedNegativeBinomial(dispersion="cell")
    l = torch.randn(5, G)  # noqa: E741
    want = fastvae.zero_inflated_negative_binomial_log_prob(x, f.exp(), s.exp(), l)
    decoded = torch.cat([f, s, l], 1)
    torch.testing.assert_close(inflated.log_prob(x, decoded), want)
    torch.testing.assert_close(inflated.mean(decoded), f.exp() * torch.sigmoid(-l))


@pytest.mark.parametrize("shape", [0.03, 0.5, 1.0, 3.0, 200.0])
def test_gamma_variables(shape: float) -> None:
    eps = torch.randn(
        13,
        20_000,
        generator=seeded(4),
        dtype=torch.float64,
    )
    x = _gamma(eps, torch.full((20_000,), shape, dtype=torch.float64))
    assert scipy_stats.kstest(x.cpu(), scipy_stats.gamma(shape).cdf).pvalue > 1e-3
    assert scipy_stats.kstest(x.cpu(), scipy_stats.gamma(1.1 * shape).cdf).pvalue < 1e-3


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.7, 9.0, 350.0, 1e6])
def test_poisson_variables_are_exact(rate: float) -> None:
    eps = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    got = _poisson(eps, torch.full_like(eps, rate))
    want = scipy_stats.poisson(rate).ppf(scipy_stats.norm.cdf(eps.cpu()))
    assert torch.equal(got.cpu(), torch.from_numpy(want).clamp(min=0))


def test_samples_do_not_depend_on_how_many_there_are() -> None:
    likelihood = fastvae.ZeroInflatedNegativeBinomial(G)
    decoded = torch.randn(6, 2 * G)
    assert torch.equal(
        likelihood.sample(decoded, seed=1)[:4], likelihood.sample(decoded[:4], seed=1)
    )


def model(likelihood: fastvae.Likelihood) -> fastvae.VAE:
    class Decoder(nn.Linear):
        def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
            return super().forward(z)

    class Encoder(Decoder):
        def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
            return super().forward(torch.log1p(x))

    return fastvae.VAE(
        Encoder(G, 4), Decoder(2, likelihood.outputs * G), latent_shape=2, likelihood=likelihood
    )


OBJECTIVES: dict[str, Callable[[], object]] = {
    "elbo": fastvae.ELBO,
    "samples": lambda: fastvae.ELBO(samples=3),
    "iwae": lambda: fastvae.IWAE(4),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dispersion", ["gene", "cell", "group"])
def test_models_of_counts(objective: str, dispersion: str) -> None:
    torch.manual_seed(0)
    features = None if dispersion == "cell" else G
    groups = 3 if dispersion == "group" else None
    likelihood = fastvae.ZeroInflatedNegativeBinomial(
        features, dispersion=dispersion, groups=groups, library="observed"
    )
    vae, x = model(likelihood), counts()
    vae.objective = OBJECTIVES[objective]()
    group = torch.tensor([0, 1, 2, 1, 0]) if dispersion == "group" else None
    output = vae(x, group, seed=1)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert vae.reconstruct(x, group).shape == x.shape
    assert (vae.reconstruct(x, group).sum(1) < x.sum(1)).all()  # the rest are extra zeros
    assert vae.sample(5, group, noise=True, seed=1).shape == x.shape
    if dispersion != "group":
        assert math.isfinite(vae.report(x, seed=0).elbo)
    assert vae.log_likelihood(x, 16, group, seed=0).value.isfinite().all()


def test_bad_options() -> None:
    for call, message in (
        (lambda: fastvae.Poisson("mean"), "library is 'mean'; want None or 'observed'"),
        (lambda: fastvae.Poisson(library_size=0), "library_size is 0; want a number above 0"),
        (lambda: fastvae.NegativeBinomial(3, dispersion="x"), "dispersion is 'x'; want one of"),
        (lambda: fastvae.NegativeBinomial(3, groups=2), "groups is 2 with dispersion='gene'"),
        (lambda: fastvae.NegativeBinomial(3, dispersion="group"), "groups is None with"),
        (lambda: fastvae.NegativeBinomial(), "features is None with dispersion='gene'"),
        (lambda: fastvae.NegativeBinomial(3, dispersion="cell"), "features is 3 with"),
        (lambda: fastvae.NegativeBinomial(3, theta=-1), "theta is -1; want a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
