"""`python -m fastvae verify` passes, and fails when a formula is broken on purpose."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import ops, verify
from fastvae.cli import main
from fastvae.models import exact
from fastvae.ops.op import OPS

BACKENDS = ("native", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_identities_hold(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    if backend == "native" and fastvae.info()["build"] is None:
        pytest.skip("no binary")
    assert main(["verify", "--backend", backend]) == 0
    printed = capsys.readouterr().out
    assert f"hold; {backend} backend, cpu" in printed
    rows = [line for line in printed.splitlines() if line.endswith("  ok")]
    assert len(rows) > 30
    assert f"all {len(rows)} hold" in printed
    assert all(group in printed for group in verify.CHECKS)


def scaled(function: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: factor * function(*args, **kwargs)


def offset(function: Callable[..., Tensor], by: float) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*args, **kwargs) + by


def without(function: Callable[..., Any], **wrong: object) -> Callable[..., Any]:
    """The function, with some arguments forced."""
    return lambda *args, **kwargs: function(*args, **{**kwargs, **wrong})


# What is broken: where, what stands there instead, and the group of identities that must notice.
BROKEN: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "KL 1e-6 too large": (
        "fastvae.ops.gaussian._kl",
        lambda f: scaled(f, 1 + 1e-6),
        "probabilistic PCA",
    ),
    "KL without the mean": (
        "fastvae.ops.gaussian._kl",
        lambda f: lambda mu, *others, **settings: f(0 * mu, *others, **settings),
        "KL",
    ),
    "sigma where sigma^2 belongs": (
        "fastvae.ops.gaussian.sigma",
        lambda f: lambda s, param: f(s, param) ** 2,
        "KL",
    ),
    "free nats where there are none": (
        "fastvae.ops.balanced_categorical_kl_divergence",
        lambda f: without(f, free_nats=20.0),
        "categorical latents",
    ),
    "a uniform part that is not asked for": (
        "fastvae.ops.straight_through_categorical",
        lambda f: without(f, uniform_mix=0.5),
        "categorical latents",
    ),
    "the balance the wrong way around": (
        "fastvae.ops.categoricals._balanced_kl",
        lambda f: lambda q, p, **o: f(q, p, **{**o, "balance": 1 - o["balance"]}),
        "categorical latents",
    ),
    "ln 2 pi forgotten": (
        "fastvae.ops.gaussian_log_prob",
        lambda f: offset(f, 1e-3),
        "Gaussian toy",
    ),
    "no ln K": (
        "fastvae.models.objectives.log_mean_exp",
        lambda f: lambda log_w, dim=0: torch.logsumexp(log_w, dim),
        "importance weights",
    ),
    "n - 1 instead of n": (
        "fastvae.models.importance._Weights.result",
        lambda f: lambda self: f(self)._replace(value=self.log_sum - math.log(self.n - 1)),
        "probabilistic PCA",
    ),
    "score term kept": (
        "fastvae.models.objectives.log_weights",
        lambda f: without(f, path_derivative=False),
        "gradients",
    ),
    "DReG with one factor v": (
        "torch.Tensor.register_hook",
        lambda f: lambda self, hook: None,
        "gradients",
    ),
    "the prior's density forgotten": (
        "fastvae.ops.gaussian._sample_and_log_ratio",
        lambda f: lambda *a, **k: (f(*a, **k)[0], f(*a, **k)[1] + 0.5 * f(*a, **k)[0].square()),
        "importance weights",
    ),
    "optimal sigma with N - 1": (
        "torch.log",
        lambda f: lambda t: f(t * 120 / 119),
        "σ and β",
    ),
    "beta applied twice": (
        "fastvae.models.penalties.Beta.__call__",
        lambda f: lambda self, kl: self.beta * f(self, kl),
        "σ and β",
    ),
    "free bits before the mean": (
        "fastvae.models.penalties.FreeBits.__call__",
        lambda f: lambda self, kl: kl.clamp(min=self.nats).sum(1).mean(),
        "σ and β",
    ),
    "off-diagonal forgotten": (
        "fastvae.models.cholesky.CholeskyGaussian.kl",
        lambda f: (
            lambda self, prior=None: fastvae.DiagonalGaussian(
                self.mu, self._logvar(), event_ndim=1
            ).kl(prior)
        ),
        "KL",
    ),
    "half a log-determinant": (
        "fastvae.models.cholesky.CholeskyGaussian._log_det",
        lambda f: scaled(f, 0.5),
        "KL",
    ),
    "continuous Bernoulli without its normalizer": (
        "fastvae.ops.continuous_bernoulli_log_prob",
        lambda f: ops.bernoulli_log_prob,
        "likelihoods",
    ),
    "a wrong Taylor coefficient": (
        "fastvae.ops.pixels._LOG_SINHC",
        lambda f: (1 / 2, *f[1:]),
        "likelihoods",
    ),
    "discretized logistic with bins of another width": (
        "fastvae.ops.discretized_logistic_log_prob",
        lambda f: lambda x, m, s, **o: f(x, m, s, **{**o, "bins": o["bins"] + 1}),
        "likelihoods",
    ),
    "sigma^2 of the last eigenvalue": (
        "fastvae.models.exact.ProbabilisticPCA.__init__",
        lambda f: (
            lambda self, x, k: (
                f(self, x, k),
                setattr(self, "variance", self.eigenvalues[-1]),
            )[0]
        ),
        "probabilistic PCA",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_formulas_are_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, broken, group = BROKEN[name]
    right = pkgutil.resolve_name(target)
    monkeypatch.setattr(verify, "CHECKS", {group: verify.CHECKS[group]})
    wrong = broken(right)
    monkeypatch.setattr(target, wrong)
    for op in OPS.values():
        if op._definition.function is right:
            monkeypatch.setattr(op._definition, "function", wrong)
    assert main(["verify", "--backend", "reference"]) == 1
    assert "identities FAIL" in capsys.readouterr().out


def test_nan_fails() -> None:
    assert not verify.Check("", "", math.nan, 1.0).holds
    assert verify.Check("", "", 1.0, 1.0).holds


# ---- The exact model -----------------------------------------------------------------------------


def test_probabilistic_pca_is_a_maximum() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    ppca = exact.ProbabilisticPCA(x, 2)
    best = ppca.log_prob(x).mean()
    assert best.item() == pytest.approx(-ppca.rate - ppca.distortion)
    for attribute in ("weight", "variance", "mean"):
        value = getattr(ppca, attribute)
        for _ in range(5):
            setattr(ppca, attribute, value + 0.02 * value.abs().mean() * torch.randn_like(value))
            assert ppca.log_prob(x).mean() < best
        setattr(ppca, attribute, value)
    with pytest.raises(ValueError, match=r"k is 5; want 1 to 4"):
        exact.ProbabilisticPCA(x, 5)
    with pytest.raises(ValueError, match=r"x has shape \[4, 5\]; want \[N, D\] with N above D"):
        exact.ProbabilisticPCA(x[:4], 2)


def test_a_linear_vae_trained_reaches_it() -> None:
    """Within 0.05 nats of the exact maximum, and 2 degrees of the principal subspace."""
    torch.manual_seed(0)
    spread = torch.tensor([3.0, 2.0, 1.5, 0.5, 0.5, 0.5, 0.4, 0.4])
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    x = torch.randn(500, 8) * spread @ basis + 1
    ppca = exact.ProbabilisticPCA(x, 3)
    model = fastvae.VAE(
        torch.nn.Linear(8, 6),
        torch.nn.Linear(3, 8),
        latent_shape=3,
        likelihood=fastvae.LearnedGaussian(),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    steps = 1500
    schedule = fastvae.Linear(0.0, steps, start=0.03)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.zero_grad()
        model(x, seed=step).loss.backward()
        optimizer.step()
    report = model.report(x, samples=500, seed=0)
    best = ppca.log_prob(x.double()).mean().item()
    assert best - 0.05 < report.elbo < best + 0.02
    assert report.rate == pytest.approx(ppca.rate, abs=0.1)
    basis = torch.linalg.qr(model.decoder.weight.detach().double()).Q
    cosines = torch.linalg.svdvals(basis.T @ ppca.directions)
    assert cosines.clamp(max=1).acos().rad2deg().max() < 2
    start = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    assert torch.linalg.svdvals(start.T @ ppca.directions).acos().rad2deg().max() > 10
