"""`fastvae.audit` finds every planted fault, by name, line and number; correct models are clean."""

from __future__ import annotations

import inspect

import audit_faults as faults
import audit_models as models
import pytest
import torch
from torch import Tensor, nn

import fastvae

TOLERANCE = 1e-2


def audited(kind: type[nn.Module], **options: object) -> fastvae.auditing.Audit:
    torch.manual_seed(0)
    model = kind()
    return fastvae.audit(model, models.data(model), **options)


def fault_line(kind: type[nn.Module]) -> int:
    lines, start = inspect.getsourcelines(kind)
    return next(start + k for k, line in enumerate(lines) if "# fault" in line)


# ---- Correct models ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", models.CORRECT, ids=lambda kind: kind.__name__)
def test_no_false_alarm(kind: type[nn.Module]) -> None:
    report = audited(kind)
    assert report.ok, report
    # Clean because it was measured, not because nothing was understood.
    assert report.notes == []
    assert report.effective_beta == pytest.approx(1.0, rel=TOLERANCE)
    assert len(report.latents) == (2 if kind is models.Hierarchical else 1)


def test_beta_is_no_fault_where_it_is_said() -> None:
    report = audited(models.BetaFour, beta=4.0)
    assert report.ok, report
    assert report.effective_beta == pytest.approx(4.0)
    [finding] = audited(models.BetaFour).findings
    assert finding.kind == "kl-weight"
    assert finding.measured == pytest.approx(4.0, rel=TOLERANCE)
    assert "give beta=4" in finding.says


MODELS = {
    "ELBO of several samples": {"objective": fastvae.ELBO(samples=4)},
    "Monte Carlo KL": {"objective": fastvae.ELBO(kl="monte_carlo", samples=3)},
    "sticking the landing": {"objective": fastvae.StickingTheLanding(3)},
    "IWAE": {"objective": fastvae.IWAE(5)},
    "DReG": {"objective": fastvae.DReG(5)},
    "capacity": {"objective": fastvae.ELBO(fastvae.Capacity(25.0, 1.0))},
    "free bits": {"objective": fastvae.ELBO(fastvae.FreeBits(0.5))},
    "beta-TC": {"objective": fastvae.BetaTC(dataset_size=100)},
    "mixture prior": {"prior": fastvae.MixturePrior(4, models.L)},
    "learned prior": {"prior": fastvae.LearnedGaussianPrior(models.L)},
    "learned sigma": {"likelihood": fastvae.LearnedGaussian()},
    "optimal sigma": {"likelihood": fastvae.OptimalGaussian()},
    "continuous Bernoulli": {"likelihood": fastvae.ContinuousBernoulli()},
    "log_std": {"param": "log_std"},
    "bound": {"bound": fastvae.Bound(-10, 5)},
}
NOT_CHECKED = {"beta-TC"}  # whose KL is in parts


@pytest.mark.parametrize("name", MODELS)
def test_models_of_this_package(name: str) -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(models.D, 2 * models.L), nn.Linear(models.L, models.D)
    model = fastvae.VAE(encoder, decoder, **MODELS[name])
    report = fastvae.audit(model, torch.rand(9, models.D))
    assert report.ok, report
    assert bool(report.notes) == (name in NOT_CHECKED)


def test_the_whole_loss_may_have_any_scale() -> None:
    """nats, bits per dimension, or a mean over pixels of KL and likelihood alike."""

    class Bits(models.SumOverBatch):
        def loss(self, x, decoded, mu, logvar):
            loss, *others = super().loss(x, decoded, mu, logvar)
            return loss / (len(x) * models.D * 0.6931), *others

    assert audited(Bits).ok


def test_other_terms_are_no_faults() -> None:
    """Weight decay, and a penalty of mu: what they charge is not taken for a KL's term."""

    class Penalized(models.Plain):
        def loss(self, x, decoded, mu, logvar):
            decay = sum(p.square().sum() for p in self.parameters())
            return super().loss(x, decoded, mu, logvar) + 0.1 * mu.mean(0).square().sum() + decay

    report = audited(Penalized)
    assert report.ok, report


# ---- Faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", faults.FAULTY, ids=lambda kind: kind.__name__)
def test_faults_are_found(kind: type[nn.Module]) -> None:
    name, measured = faults.FAULTY[kind]
    [finding] = audited(kind).findings
    assert finding.kind == name
    assert finding.file == faults.__file__
    assert finding.line == fault_line(kind)
    if measured is not None:
        assert finding.measured == pytest.approx(measured, rel=TOLERANCE, abs=1e-9)


def test_numbers_of_values() -> None:
    """Those that depend on the weights, against the model's own."""
    torch.manual_seed(0)
    model = faults.NegativeKL()
    x = models.data(model)[:7]
    h = model.encoder(x)
    kl = model.kl(model.mu(h), model.logvar(h)) / 7
    [finding] = fastvae.audit(model, x).findings
    assert finding.measured == pytest.approx(kl.item(), rel=1e-4)
    assert finding.measured < 0

    torch.manual_seed(0)
    model = faults.Overflowing()
    x = models.data(model)[:7]
    largest = model.logvar(model.encoder(x)).max().item()
    [finding] = fastvae.audit(model, x).findings
    assert finding.measured == pytest.approx(largest, rel=1e-4)
    assert torch.tensor(largest).half().exp().isinf()


def test_two_faults_at_once() -> None:
    class Both(faults.VarianceAsSigma):
        def loss(self, x, decoded, mu, logvar):
            return nn.functional.mse_loss(decoded, x) + torch.mean(
                0.5 * (mu**2 + logvar.exp() - 1 - logvar)
            )

    report = audited(Both)
    assert {f.kind for f in report.findings} == {
        "sigma-confused",
        "kl-averaged",
        "likelihood-averaged",
    }
    assert report.effective_beta == pytest.approx(models.D / models.L, rel=TOLERANCE)


def test_a_mean_over_the_batch_is_told_from_a_weight() -> None:
    """With a batch of 7, half of a sum and 3.5 times a mean are one number."""

    class Halved(faults.WrongBeta):
        def loss(self, x, decoded, mu, logvar):
            kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)
            return self.nll(x, decoded) + 0.5 * kl.sum()

    [finding] = audited(Halved).findings
    assert finding.kind == "kl-halved"
    [finding] = audited(faults.WrongBeta).findings
    assert finding.kind == "kl-weight"


# ---- What a program may be -----------------------------------------------------------------------


def test_the_model_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = models.Convolutional().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = models.data(model)
    state = torch.get_rng_state()
    fastvae.audit(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Parts(models.Plain):
    """Returns no loss."""

    def loss(self, x, decoded, mu, logvar):
        return decoded, mu, logvar


def elbo(model: Parts, batch: dict[str, Tensor]) -> Tensor:
    decoded, mu, logvar = model(batch["x"])
    return models.Plain.loss(model, batch["x"], decoded, mu, logvar)


def test_a_loss_of_the_users_and_a_batch_of_several_tensors() -> None:
    model = Parts()
    batch = {"x": torch.rand(9, models.D), "label": torch.arange(9)}
    report = fastvae.audit(model, batch, elbo)
    assert report.ok, report
    assert report.effective_beta == pytest.approx(1.0)
    with pytest.raises(TypeError, match=r"the loss has shape \[9, 12\]; want \[\]"):
        fastvae.audit(model, batch["x"])


def test_what_will_not_run_in_float64() -> None:
    class Single(faults.KLAveraged):
        def forward(self, x: Tensor):
            assert x.dtype == torch.float32
            return super().forward(x)

    [finding] = audited(Single).findings
    assert finding.kind == "kl-averaged"
    assert finding.measured == pytest.approx(1 / models.L, rel=TOLERANCE)


def test_errors_of_the_program_are_its_own() -> None:
    class Broken(models.Plain):
        def forward(self, x: Tensor):
            raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        audited(Broken)


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.rand(1, models.D), "x has 1 examples"), (torch.rand(()), "x has 0 examples")],
)
def test_batches_that_are_too_small(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastvae.audit(models.Plain(), x)


def test_what_is_not_understood_is_said() -> None:
    """A full covariance is out of reach: no fault, and no clean bill of its KL."""
    q = fastvae.CholeskyGaussian.from_params
    size = models.L + models.L * (models.L + 1) // 2
    model = fastvae.VAE(nn.Linear(models.D, size), nn.Linear(models.L, models.D), posterior=q)
    report = fastvae.audit(model, torch.rand(9, models.D))
    assert report.ok
    assert "not diagonal" in " ".join(report.notes)
    assert report.effective_beta is None


def test_a_loss_that_is_not_finite() -> None:
    class Infinite(models.Plain):
        def kl(self, mu, logvar):
            return super().kl(mu, logvar) + torch.log(torch.zeros(())) * 1.0  # fault

    [finding] = audited(Infinite).findings
    assert (finding.kind, finding.line) == ("not-finite", fault_line(Infinite))
