"""Objectives that look at the aggregate posterior."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.models.aggregates import _Aggregate

pytestmark = pytest.mark.usefixtures("on_device")

SEED = 5


def a_model(objective: object, prior: fastvae.Prior | None = None) -> tuple[fastvae.VAE, Tensor]:
    torch.manual_seed(0)
    model = fastvae.VAE(
        nn.Linear(6, 8), nn.Linear(4, 6), latent_shape=4, objective=objective, prior=prior
    )
    return model.double(), torch.randn(32, 6, dtype=torch.float64)


def posterior_and_sample(model: fastvae.VAE, x: Tensor) -> tuple[fastvae.DiagonalGaussian, Tensor]:
    q = model.encode(x)
    return q, model.prior.rsample_kl(q, seed=SEED)[0]


@pytest.mark.parametrize("estimator", ["mss", "mws"])
@pytest.mark.parametrize("mixture", [False, True])
def test_beta_tc_at_one_is_the_sampled_rate(estimator: str, mixture: bool) -> None:
    objective = fastvae.BetaTC(500, 1.0, 1.0, 1.0, estimator)
    model, x = a_model(objective, fastvae.MixturePrior(3, 4) if mixture else None)
    out = model(x, seed=SEED)
    q, z = posterior_and_sample(model, x)
    rate = (q.log_prob(z) - model.prior.log_prob(z)).mean()
    torch.testing.assert_close(out.loss, rate - out.log_likelihood.mean())
    torch.testing.assert_close(out.bound, out.log_likelihood - out.kl)


def test_beta_tc_weighs_its_terms() -> None:
    objective = fastvae.BetaTC(500, 0.5, 4.0, 2.0)
    model, x = a_model(objective)
    out = model(x, seed=SEED)
    q, z = posterior_and_sample(model, x)
    joint, marginals = fastvae.aggregate_log_prob(z, q.mu, q.logvar, dataset_size=500)
    penalty = (
        0.5 * (q.log_prob(z) - joint)
        + 4 * (joint - marginals)
        + 2 * (marginals - model.prior.log_prob(z))
    )
    torch.testing.assert_close(out.loss, penalty.mean() - out.log_likelihood.mean())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def _kernel_mean(a: Tensor, b: Tensor, kernel: str, c: float, same: bool) -> Tensor:
    squares = (a.unsqueeze(1) - b).square().sum(-1)
    k = torch.exp(-squares / (2 * c)) if kernel == "rbf" else c / (c + squares)
    return k[~torch.eye(len(a), dtype=torch.bool)].mean() if same else k.mean()


@pytest.mark.parametrize(("kernel", "scale"), [("rbf", 5.0), ("imq", 10.0), ("imq", 3.0)])
def test_mmd(kernel: str, scale: float) -> None:
    x = torch.randn(20, 5, dtype=torch.float64)
    y = torch.randn(30, 5, dtype=torch.float64) + 0.3
    right = (
        _kernel_mean(x, x, kernel, scale, True)
        + _kernel_mean(y, y, kernel, scale, True)
        - 2 * _kernel_mean(x, y, kernel, scale, False)
    )
    default = {"rbf": 5.0, "imq": 10.0}[kernel] == scale
    found = fastvae.mmd(x, y, kernel=kernel, scale=None if default else scale)
    torch.testing.assert_close(found, right)
    in_float32 = fastvae.mmd(x.float(), y.float(), kernel=kernel, scale=scale)
    torch.testing.assert_close(in_float32.double(), right, atol=3e-7, rtol=1e-5)


def test_mmd_has_no_bias() -> None:
    torch.manual_seed(0)
    found = torch.stack([fastvae.mmd(*torch.randn(2, 16, 4)) for _ in range(400)])
    assert found.mean().abs() < 4 * found.std() / 20
    assert fastvae.mmd(torch.randn(200, 4), torch.randn(200, 4) + 1) > 0.05


def test_mmd_of_equal_rows_has_gradients() -> None:
    x = torch.zeros(4, 3, requires_grad=True)
    fastvae.mmd(x, torch.ones(4, 3)).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_info_vae() -> None:
    model, x = a_model(fastvae.InfoVAE(0.25, 8.0))
    out = model(x, seed=SEED)
    assert torch.equal(model(x, seed=SEED).loss, out.loss)  # all that is drawn is the seed's
    q, z = posterior_and_sample(model, x)
    drawn = model.prior.sample(torch.zeros_like(z), seed=~SEED)
    penalty = 0.75 * q.kl().mean() + (0.25 + 8 - 1) * fastvae.mmd(z, drawn)
    torch.testing.assert_close(out.loss, penalty - out.log_likelihood.mean())


@pytest.mark.parametrize("kind", [1, 2])
def test_dip_vae(kind: int) -> None:
    model, x = a_model(fastvae.DIPVAE(3.0, 5.0, kind))
    out = model(x, seed=SEED)
    q, _ = posterior_and_sample(model, x)
    covariance = torch.cov(q.mean.T, correction=0)
    if kind == 2:
        covariance = covariance + torch.diag(q.variance.mean(0))
    off = covariance - torch.diag(covariance.diagonal())
    penalty = 3 * off.square().sum() + 5 * (covariance.diagonal() - 1).square().sum()
    torch.testing.assert_close(out.loss, q.kl().mean() + penalty - out.log_likelihood.mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastvae.BetaTC(0), "dataset_size is 0"),
        (lambda: fastvae.BetaTC(5, beta=-1), "beta is -1"),
        (lambda: fastvae.BetaTC(5, estimator="x"), "estimator is 'x'"),
        (lambda: fastvae.InfoVAE(2.0), "alpha is 2.0"),
        (lambda: fastvae.InfoVAE(0.0, 0.5), "lambda_ is 0.5"),
        (lambda: fastvae.InfoVAE(kernel="x"), "kernel is 'x'"),
        (lambda: fastvae.InfoVAE(scale=0.0), "scale is 0.0"),
        (lambda: fastvae.DIPVAE(-1.0), "off_diagonal is -1.0"),
        (lambda: fastvae.DIPVAE(kind=3), "kind is 3"),
        (lambda: fastvae.mmd(torch.ones(1, 2), torch.ones(3, 2)), "two each at least"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("objective", [fastvae.BetaTC(500), fastvae.DIPVAE()], ids=str)
def test_full_covariance_is_refused(objective: _Aggregate) -> None:
    torch.manual_seed(0)
    model = fastvae.VAE(
        nn.Linear(6, 4 * 7 // 2),
        nn.Linear(4, 6),
        latent_shape=4,
        objective=objective,
        posterior=fastvae.CholeskyGaussian.from_params,
    )
    with pytest.raises(TypeError, match="diagonal Gaussian"):
        model(torch.randn(8, 6))


def test_responsibilities() -> None:
    prior = fastvae.MixturePrior(4, 3)
    with torch.no_grad():
        prior.logits.copy_(torch.randn(4))
    z = torch.randn(2, 5, 3)
    p = prior.components()
    joint = p.log_prob(z.unsqueeze(-2)) + torch.log_softmax(prior.logits, 0)
    torch.testing.assert_close(prior.responsibilities(z), joint.softmax(-1))
    torch.testing.assert_close(prior.log_prob(z), joint.logsumexp(-1))
