"""`python -m fastvae train`: models, objectives and sweeps on real data."""

from __future__ import annotations

import argparse
import copy
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from PIL import Image
from train_command import FILES, SMALL, final_state, metrics, refusal, timeless, train

from fastvae.training import data
from fastvae.training.command import _settings
from fastvae.training.options import add_arguments
from fastvae.training.settings import LIKELIHOODS, SIGMAS, Settings
from fastvae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    "options",
    [
        ("--objective", "iwae", "--samples", 5),
        ("--objective", "dreg", "--samples", 5),
        ("--objective", "stl", "--samples", 2),
        ("--samples", 3, "--warmup", 2),
        ("--warmup", 1, "--cycles", 2),
        ("--capacity", 5, "--beta", 3, "--warmup", 2),
        ("--free-bits", 0.5),
        ("--posterior", "full"),
        ("--prior", "learned"),
        ("--prior", "mixture", "--components", 5),
        ("--prior", "vamp", "--components", 5),
        ("--layers", 0, "--lr", 0.01),
        *(("--sigma", sigma) for sigma in SIGMAS),
        *(("--likelihood", name, "--bins", 17) for name in LIKELIHOODS[1:]),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_option_learns_the_digits(options: tuple[object, ...]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args([*SMALL, "--batch-size", "32", *map(str, options)])
    settings = _settings(arguments, None)
    x = data.load("digits").x
    whole, first, rest = (Trainer(settings, x, torch.device("cpu")) for _ in range(3))
    rows = [whole.run_epoch() for _ in range(4)]
    assert rows[-1]["heldout_elbo"] > rows[0]["heldout_elbo"] + 1
    report = whole.report(20)
    assert report["elbo"] == pytest.approx(rows[-1]["heldout_elbo"], abs=3)
    assert report["elbo"] - 0.1 < report["log_likelihood"]
    assert report["examples"] == 179
    assert whole.model.sample(3).shape == (3, 8, 8)
    assert whole.model.sample(3, noise=True).isfinite().all()
    # Bit for bit, also where the model keeps averages or the objective follows a schedule.
    first.run_epoch()
    rest.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        rest.run_epoch()
    assert timeless(rest.state_dict()) == timeless(whole.state_dict())


def test_more_importance_samples_give_a_likelier_model() -> None:
    """Held-out ln p(x): IWAE-20 above IWAE-5 above the VAE, as Burda et al. (2016) found."""
    x = data.load("digits").x
    reached = []
    for samples in (1, 5, 20):
        settings = Settings(hidden=64, layers=2, objective="iwae", samples=samples, lr=3e-3)
        trainer = Trainer(settings, x, torch.device("cpu"))
        for _ in range(12):
            trainer.run_epoch()
        report = trainer.report(100)
        assert report["log_likelihood_standard_error"] < 0.1
        reached.append(report["log_likelihood"])
    assert reached[0] + 0.3 < reached[1] < reached[2] - 0.3


def test_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(hidden=8, batch_size=1000, beta=4.0, warmup=2)
    trainer = Trainer(settings, data.load("digits").x, torch.device("cpu"))
    seen = []
    for _ in range(3):
        trainer.run_epoch(lambda: seen.append(trainer.model.objective.penalty.beta))
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    settings = Settings(hidden=8, batch_size=1000, capacity=4.0, warmup=2)
    trainer = Trainer(settings, data.load("digits").x, torch.device("cpu"))
    trainer.run_epoch()
    assert trainer.model.objective.penalty.capacity == 1.0


def test_a_sweep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--sweep-beta", 0.1, 1, 10, "--epochs", 8)
    assert train(*options) == 0
    out = Path("runs/digits-sweep-beta")
    assert {path.name for path in out.iterdir()} == {
        "beta-0.1",
        "beta-1.0",
        "beta-10.0",
        "sweep.csv",
        "sweep.png",
    }
    assert {path.name for path in (out / "beta-1.0").iterdir()} == FILES
    with open(out / "sweep.csv", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [row["beta"] for row in rows] == [0.1, 1, 10]
    rates = [row["rate"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    for row in rows:
        report = json.loads((out / f"beta-{row['beta']}" / "report.json").read_text())
        assert all(row[name] == report[name] for name in row if name != "beta")
    with Image.open(out / "sweep.png") as image:
        assert np.asarray(image.convert("L"), dtype=float).std() > 20
    assert "runs/digits-sweep-beta/sweep.png" in capsys.readouterr().out

    # One that was interrupted goes on: what is finished stays, what never began begins.
    before = (out / "sweep.csv").read_text()
    for name in ("checkpoint.pt", "metrics.csv", "figure.png", "report.json"):
        (out / "beta-10.0" / name).unlink()
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(1), step(self)))
    assert train(*options, "--resume") == 0
    assert len(steps) == 8 * 13
    assert (out / "sweep.csv").read_text() == before
    assert "is runs/digits-sweep-beta/beta-0.1, where" in refusal(
        capsys, *options, "--out", "runs/digits-sweep-beta"
    )


def test_other_sweeps() -> None:
    assert train("--sweep-samples", 1, 3, "--objective", "iwae", "--epochs", 1, "--out", "k") == 0
    assert train("--sweep-sigma", 0.2, "optimal", "--epochs", 1, "--out", "s") == 0
    assert {path.name for path in Path("s").iterdir()} == {
        "sigma-0.2",
        "sigma-optimal",
        "sweep.csv",
        "sweep.png",
    }


def test_seeds_and_their_spread(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--sweep-seed", 0, 1, 5, "--epochs", 1) == 0
    out = Path("runs/digits-sweep-seed")
    reports = [json.loads((out / f"seed-{seed}/report.json").read_text()) for seed in (0, 1, 5)]
    elbos = [report["elbo"] for report in reports]
    assert len(set(elbos)) == 3
    spread = json.loads((out / "spread.json").read_text())
    assert spread["elbo"]["mean"] == pytest.approx(np.mean(elbos))
    assert spread["elbo"]["standard_deviation"] == pytest.approx(np.std(elbos, ddof=1))
    printed = capsys.readouterr().out
    assert f"mean{spread['rate']['mean']:16.3f}" in printed
    assert f"± s.d.{spread['rate']['standard_deviation']:16.3f}" in printed


# ---- Early stopping ------------------------------------------------------------------------------


def test_patience_stops_a_run_and_keeps_its_best_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    """A few examples, soon learned by heart."""
    x = np.random.default_rng(0).random((60, 20)).astype(np.float32)
    np.save("few.npy", x)
    options = ("--data", "few.npy", "--lr", 0.01, "--batch-size", 8, "--sigma", 0.1)
    options = (*options, "--patience", 3, "--epochs", 200)
    assert train(*options, "--out", "whole") == 0
    rows = metrics("whole")
    elbos = [row["heldout_elbo"] for row in rows]
    best = 1 + int(np.argmax(elbos))
    assert len(rows) == best + 3 < 200
    report = json.loads(Path("whole/report.json").read_text())
    assert report["epoch"] == best
    # The rate is exact, and tells the epochs apart.
    assert report["rate"] == pytest.approx(rows[best - 1]["heldout_rate"], rel=1e-4)
    assert report["rate"] != pytest.approx(rows[-1]["heldout_rate"], rel=1e-2)
    assert f"the best of {best + 3} epochs was epoch {best}" in capsys.readouterr().out

    # Stopped between the best epoch and the end, it goes on bit for bit.
    assert train(*options[:-1], best + 1, "--out", "parts") == 0
    assert train("--data", "few.npy", "--resume", "--out", "parts", *options[2:]) == 0
    assert final_state("parts") == final_state("whole")
    assert json.loads(Path("parts/report.json").read_text()) == report


def test_the_best_epoch_is_the_last_that_rose() -> None:
    trainer = Trainer(Settings(hidden=8, patience=2), data.load("digits").x, torch.device("cpu"))
    evaluations = iter([-30.0, -20.0, -20.0, -19.0, -19.5, -19.2])

    def evaluate() -> dict[str, float]:
        elbo = next(evaluations)
        return {"heldout_elbo": elbo, "heldout_rate": 1.0, "heldout_distortion": -elbo - 1}

    trainer.evaluate = evaluate
    best = []
    while not trainer.is_done:
        trainer.run_epoch()
        best.append(trainer.best["epoch"])
    assert best == [1, 2, 2, 4, 4, 4]
    last = trainer.state_dict()["model"]["decoder.0.weight"].clone()
    assert trainer.restore_best() == 4
    assert not torch.equal(trainer.model.state_dict()["decoder.0.weight"], last)


# ---- Mixed precision -----------------------------------------------------------------------------


def test_half_precision_learns_the_same() -> None:
    """Near the curve of float32, on other numbers, with weights and data in float32."""
    x, device = data.load("digits").x, torch.device("cpu")
    whole, half = (Trainer(Settings(precision=p), x, device) for p in ("float32", "bfloat16"))
    seen = set()
    half.model.encoder[1].register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    for _ in range(3):
        exact, rough = whole.run_epoch(), half.run_epoch()
    assert seen == {torch.bfloat16, torch.float32}  # training, evaluation
    assert rough["heldout_elbo"] == pytest.approx(exact["heldout_elbo"], abs=1)
    assert rough["heldout_elbo"] != exact["heldout_elbo"]
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


# ---- Compiled networks ---------------------------------------------------------------------------


def test_compiled_networks_learn_the_same() -> None:
    """The curve of eager ones but for rounding; after a checkpoint too, when what is compiled first
    may be compiled for other shapes."""
    x, device = data.load("digits").x, torch.device("cpu")
    options = {"layers": 1, "hidden": 16, "batch_size": 256}
    eager = Trainer(Settings(**options), x, device)
    whole, first, rest = (Trainer(Settings(**options, compile=True), x, device) for _ in range(3))
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        row, expected = whole.run_epoch(), eager.run_epoch()
        assert row["heldout_elbo"] == pytest.approx(expected["heldout_elbo"], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert whole.state_dict()["model"].keys() == eager.state_dict()["model"].keys()
    torch.compiler.reset()
    first.run_epoch()
    torch.compiler.reset()
    rest.load_state_dict(copy.deepcopy(first.state_dict()))
    row = rest.run_epoch()
    assert row["heldout_elbo"] == pytest.approx(whole.history[-1]["heldout_elbo"], rel=1e-4)
