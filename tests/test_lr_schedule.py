"""`--lr-schedule`: what the rate is, that a run goes on along it, and what it is good for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvae.cli import main
from fastvae.models import exact
from fastvae.training import checkpoint
from fastvae.training.settings import Settings, lr_schedule
from fastvae.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As on the command line: steps so small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian_data(n: int = 500) -> Tensor:
    """Three directions that stand out of eight."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([3.0, 2.0, 1.5, 0.5, 0.5, 0.5, 0.4, 0.4])
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    return torch.randn(n, 8, generator=generator) * spread @ basis + 1


def linear(**settings: Any) -> Settings:
    return Settings(latent_dim=3, layers=0, sigma="learned", lr=0.03, **settings)


def trained(trainer: Trainer, epochs: int) -> Trainer:
    for _ in range(epochs):
        trainer.run_epoch()
    return trainer


def same(a: Trainer, b: Trainer) -> bool:
    """Whether two runs stand at the same numbers, bit for bit."""
    states = [trainer.model.state_dict().values() for trainer in (a, b)]
    return all(torch.equal(p, q) for p, q in zip(*states, strict=True)) and all(
        p["lr"] == q["lr"]
        for p, q in zip(a.optimizer.param_groups, b.optimizer.param_groups, strict=True)
    )


def test_factors() -> None:
    constant = lr_schedule(linear(), 10)
    assert {constant(step) for step in range(2000)} == {1.0}
    cosine = lr_schedule(linear(epochs=20, lr_schedule="cosine"), 10)
    assert [cosine(step) for step in (0, 100, 200)] == pytest.approx([1, 0.5, 0])
    assert cosine(50) == pytest.approx(0.5 + 0.5**1.5)
    factors = [cosine(step) for step in range(201)]
    assert factors == sorted(factors, reverse=True)


def test_every_parameter_follows() -> None:
    """Also a learned sigma, whose learning rate is ten times the others'."""
    trainer = trained(Trainer(linear(epochs=4, lr_schedule="cosine"), gaussian_data(), CPU), 3)
    last = trainer.lr_schedule(3 * trainer.steps - 1)
    assert 0 < last < 0.2
    assert [g["lr"] for g in trainer.optimizer.param_groups] == [0.03 * last, 0.3 * last]


def test_resumed_is_uninterrupted_bit_for_bit() -> None:
    x, settings = gaussian_data(), linear(epochs=4, lr_schedule="cosine")
    whole = trained(Trainer(settings, x, CPU), 4)
    resumed = Trainer(settings, x, CPU)
    resumed.load_state_dict(trained(Trainer(settings, x, CPU), 2).state_dict())
    assert same(trained(resumed, 2), whole)
    constant = trained(Trainer(linear(epochs=4), x, CPU), 4)
    assert not same(constant, whole)


def test_more_epochs_go_on_along_the_longer_cosine() -> None:
    x = gaussian_data()
    ended = trained(Trainer(linear(epochs=2, lr_schedule="cosine"), x, CPU), 2)
    longer = Trainer(linear(epochs=8, lr_schedule="cosine"), x, CPU)
    longer.load_state_dict(ended.state_dict())
    rates: list[float] = []
    longer.run_epoch(lambda: rates.append(longer.optimizer.param_groups[0]["lr"]))
    steps = longer.steps
    angles = np.pi * np.arange(2 * steps, 3 * steps) / (8 * steps)
    assert rates == pytest.approx(0.015 * (1 + np.cos(angles)))


def test_a_checkpoint_from_before_there_was_a_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hidden", "8", "--log-likelihood-samples", "2", "--device", "cpu"]
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", *options, "--epochs", "1", *out]) == 0
    path = tmp_path / "run" / "checkpoint.pt"
    state = checkpoint.load(path)
    del state["settings"]["lr_schedule"]
    checkpoint.save(path, state)
    with pytest.raises(SystemExit):
        main(["train", *out, "--resume", "--lr-schedule", "cosine"])
    assert "--lr-schedule: is cosine; want the resumed run's constant" in capsys.readouterr().err
    assert main(["train", *out, "--resume", "--epochs", "2", "--lr-schedule", "constant"]) == 0


def distance_from_the_best(trainer: Trainer) -> tuple[float, float]:
    """Nats below the maximum of the mean ln p(x), and the largest principal angle, in degrees."""
    train = trainer.x[trainer.rows]
    ppca = exact.ProbabilisticPCA(train, 3)
    best = ppca.log_prob(train.double()).mean().item()
    elbo = trainer.model.report(train, samples=500, seed=0).elbo
    (weight,) = (w for w in trainer.model.decoder.parameters() if w.dim() == 2)
    basis = torch.linalg.qr(weight.detach().double()).Q
    cosines = torch.linalg.svdvals(basis.T @ ppca.directions)
    return best - elbo, cosines.clamp(max=1).acos().rad2deg().max().item()


def test_a_linear_vae_reaches_the_optimum_of_probabilistic_pca(tmp_path: Path) -> None:
    """Within 0.05 nats of the exact maximum and 2 degrees of its subspace, from the command line; a
    constant rate ends farther off."""
    x = gaussian_data(2000)
    np.save(tmp_path / "x.npy", x.numpy())
    command = ["train", "--data", str(tmp_path / "x.npy"), "--layers", "0", "--latent-dim", "3"]
    command += ["--sigma", "learned", "--lr", "0.03", "--lr-schedule", "cosine", "--epochs", "80"]
    command += ["--log-likelihood-samples", "10", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    run = Trainer(Settings(**state["settings"]), x, CPU)
    run.load_state_dict(state)
    nats, degrees = distance_from_the_best(run)
    assert -0.02 < nats < 0.05
    assert degrees < 2
    constant = trained(Trainer(linear(epochs=80), x, CPU), 80)
    assert distance_from_the_best(constant)[0] > 0.1
