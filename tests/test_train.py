"""`python -m fastvae train`: what a run computes, leaves behind and survives."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_command import FILES, SMALL, final_state, metrics, refusal, timeless, train

import fastvae
from fastvae.training import checkpoint, claim, data
from fastvae.training.settings import Settings
from fastvae.training.trainer import COLUMNS, Trainer

pytestmark = pytest.mark.usefixtures("folder")


# ---- What a run leaves behind --------------------------------------------------------------------


def test_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--epochs", 6) == 0
    out = folder / "runs" / "digits"
    assert {path.name for path in out.iterdir()} == FILES
    printed = capsys.readouterr().out
    assert all(str(Path("runs/digits") / name) in printed for name in FILES)

    rows = metrics(out)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert tuple(row) == COLUMNS
        for split in ("train", "heldout"):
            elbo, rate, distortion = (row[f"{split}_{k}"] for k in ("elbo", "rate", "distortion"))
            assert elbo == pytest.approx(-rate - distortion)
            assert rate >= 0
        assert row["seconds"] > 0
    assert rows[-1]["train_elbo"] > rows[0]["train_elbo"] + 10
    assert rows[-1]["heldout_elbo"] > rows[0]["heldout_elbo"] + 3

    with Image.open(out / "figure.png") as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert min(pixels.shape) > 600
    assert pixels.std() > 20  # something is drawn


def test_an_earlier_run_is_never_written_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        assert train("--epochs", 1) == 0
    assert {path.name for path in (folder / "runs").iterdir()} == {
        "digits",
        "digits-2",
        "digits-3",
    }
    before = (folder / "runs/digits/checkpoint.pt").read_bytes()
    assert "argument --out: is runs/digits, where" in refusal(capsys, "--out", "runs/digits")
    assert (folder / "runs/digits/checkpoint.pt").read_bytes() == before


def test_held_out_metrics_are_those_of_the_model() -> None:
    x = data.load("digits").x
    trainer = Trainer(Settings(hidden=16, batch_size=50), x, torch.device("cpu"))
    assert len(trainer.heldout) == len(x) // 10
    assert len(trainer.heldout) + len(trainer.rows) == len(x)
    together = torch.cat([trainer.heldout, trainer.x[trainer.rows]])
    assert torch.equal(together, x[trainer.split(len(x), 0)])
    row = trainer.run_epoch()
    with torch.no_grad():
        rate = trainer.model.encode(trainer.heldout).kl().mean().item()
    assert row["heldout_rate"] == pytest.approx(rate, rel=1e-5)
    assert trainer.evaluate()["heldout_elbo"] == row["heldout_elbo"]


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line: the epoch, the time left, and the held-out metrics."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert train("--epochs", 2) == 0
    last = terminal.getvalue().rpartition("\r")[2]
    row = metrics("runs/digits")[-1]
    assert last.startswith("epoch 2/2: 100%")
    assert re.search(r"26/26 \[\d\d:\d\d<\d\d:\d\d, .* elbo=(-?[\d.]+)", last)
    assert f"elbo={row['heldout_elbo']:.2f}, rate={row['heldout_rate']:.2f}" in last
    assert terminal.getvalue().count("\n") == 1


def test_curves_for_tensorboard(folder: Path) -> None:
    """Once each, also after a run that was killed between checkpoint and curve."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train("--epochs", 1) == 0
    assert train("--epochs", 2, "--resume", "--tensorboard") == 0
    assert train("--epochs", 3, "--resume", "--tensorboard") == 0
    out = folder / "runs" / "digits"
    events = accumulator.EventAccumulator(str(out)).Reload()
    rows = metrics(out)
    tags = [name for name in COLUMNS if "_" in name]
    assert len(events.Tags()["scalars"]) == len(tags)
    for name in tags:
        split, metric = name.split("_")
        found = [(e.step, e.value) for e in events.Scalars(f"{metric}/{split}")]
        assert found == [(row["epoch"], np.float32(row[name])) for row in rows]


def test_tensorboard_is_an_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    message = refusal(capsys, "--tensorboard")
    assert message.startswith("argument --tensorboard: not installed; want pip install")


# ---- Resuming ------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted_bit_for_bit() -> None:
    assert train("--epochs", 4, "--out", "whole") == 0
    assert train("--epochs", 2, "--out", "parts") == 0
    assert final_state("parts") != final_state("whole")
    assert train("--epochs", 4, "--resume", "--out", "parts") == 0
    assert final_state("parts") == final_state("whole")
    assert timeless(metrics("parts")) == timeless(metrics("whole"))
    assert [row["epoch"] for row in metrics("parts")] == [1, 2, 3, 4]

    assert train("--epochs", 4, "--out", "other", "--seed", 1) == 0
    assert final_state("other")["model"] != final_state("whole")["model"]


def test_interrupted_in_the_middle_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--epochs", 4, "--out", "whole") == 0
    step, steps = torch.optim.Adam.step, 0

    def interrupted(self: torch.optim.Adam) -> None:
        nonlocal steps
        steps += 1
        if steps == 31:  # of 13 an epoch
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        assert train("--epochs", 4) == 130
    assert "--resume --out runs/digits" in capsys.readouterr().err
    assert [row["epoch"] for row in metrics("runs/digits")] == [1, 2]
    # metrics.csv may be behind the checkpoint, or be lost: it is written anew.
    Path("runs/digits/metrics.csv").unlink()
    assert train("--resume") == 0
    assert final_state("runs/digits") == final_state("whole")
    assert timeless(metrics("runs/digits")) == timeless(metrics("whole"))


def test_resuming_a_finished_run_draws_it_again() -> None:
    assert train("--epochs", 1) == 0
    before = final_state("runs/digits")
    Path("runs/digits/figure.png").unlink()
    assert train("--resume") == 0
    assert final_state("runs/digits") == before
    assert Path("runs/digits/figure.png").is_file()


def test_a_checkpoint_is_whole_or_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train("--epochs", 1, "--lr", 1e30) == 1
    message = capsys.readouterr().err
    assert "in epoch 1; runs/digits/checkpoint.pt holds epoch 0" in message
    assert "--lr than 1e+30" in message
    model = checkpoint.load(Path("runs/digits/checkpoint.pt"))["model"]
    assert all(weight.isfinite().all() for weight in model.values())


def test_both_backends_give_one_curve() -> None:
    if fastvae.info()["build"] is None:
        pytest.skip("no binary")
    for backend in ("native", "reference"):
        assert train("--epochs", 5, "--backend", backend, "--out", backend) == 0
    assert train("--epochs", 5, "--seed", 1, "--out", "other") == 0

    def curve(out: str) -> np.ndarray:
        return np.array([[row[key] for key in COLUMNS[:-1]] for row in metrics(out)])

    np.testing.assert_allclose(curve("native"), curve("reference"), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(curve("native"), curve("other"), rtol=1e-4, atol=1e-4)


# ---- Memory --------------------------------------------------------------------------------------


def peak_bytes(*options: object) -> int:
    """The most memory that a run had at any time; not getrusage's, which knows of its parent's."""
    code = (
        "import re, sys; from fastvae.cli import main; code = main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]); "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *SMALL, "--epochs", "1", *map(str, options)],
        env=os.environ | {"PYTHONPATH": str(Path(fastvae.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_data_are_in_memory_once(folder: Path) -> None:
    """As float32, beside the file's own uint8 while they are read.

    A second copy would be 8 of its bytes; what the allocator keeps besides was seen to be 1 to 2.
    """
    x = np.random.default_rng(0).integers(256, size=(50_000, 28, 28), dtype=np.uint8)
    np.savez("large.npz", x=x)
    np.savez("small.npz", x=x[:100])
    options = ("--batch-size", 1000, "--layers", 1)
    small, large = (peak_bytes("--data", f"{name}.npz", *options) for name in ("small", "large"))
    assert 4 * x.nbytes < large - small < 7 * x.nbytes


# ---- What comes from outside ---------------------------------------------------------------------


def test_labels_are_text(folder: Path) -> None:
    """No formula, which would stop the run after its last epoch."""
    x = np.random.default_rng(0).random((40, 4)).astype(np.float32)
    np.savez("mine.npz", x=x, y=np.array([r"$\frac$", "_hidden", "a_b$", "plain"] * 10))
    assert train("--data", "mine.npz", "--epochs", 1) == 0
    assert {path.name for path in (folder / "runs/mine").iterdir()} == FILES


def test_a_report_is_strict_json(folder: Path) -> None:
    """Of one sample, no standard error is known."""
    assert train("--epochs", 1, "--log-likelihood-samples", 1) == 0

    def refuse(word: str) -> None:
        raise ValueError(word)

    text = (folder / "runs/digits/report.json").read_text()
    report = json.loads(text, parse_constant=refuse)
    assert report["log_likelihood_standard_error"] is None


def test_data_outside_the_support(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.save("standardized.npy", x)
    message = refusal(capsys, "--data", "standardized.npy", "--likelihood", "bernoulli")
    assert "argument --data: x has " in message
    assert "want numbers from 0 to 1 for Bernoulli" in message
    assert not (folder / "runs").exists()


def test_a_terminal_without_signs(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastvae", "train", *SMALL, "--epochs", "1"],
        env=os.environ
        | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(fastvae.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert r"\xb1" in done.stdout


# ---- Several at once -----------------------------------------------------------------------------


def start(*options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastvae", "train", *SMALL, *map(str, options)],
        env=os.environ | {"PYTHONPATH": str(Path(fastvae.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_runs_started_together_have_folders_of_their_own(folder: Path) -> None:
    started = [start("--epochs", 2, "--seed", seed) for seed in range(2)]
    for process in started:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    runs = sorted((folder / "runs").iterdir())
    assert [run.name for run in runs] == ["digits", "digits-2"]
    seeds = {checkpoint.load(run / "checkpoint.pt")["settings"]["seed"] for run in runs}
    assert seeds == {0, 1}
    for run in runs:  # the curve of an undisturbed one
        assert {path.name for path in run.iterdir()} == FILES
        seed = checkpoint.load(run / "checkpoint.pt")["settings"]["seed"]
        assert train("--epochs", 2, "--seed", seed, "--out", f"alone-{seed}") == 0
        assert final_state(run) == final_state(f"alone-{seed}")


def test_a_folder_in_use_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    with claim.held(folder / "mine"):
        message = refusal(capsys, "--epochs", 1, "--out", "mine")
        assert "argument --out: is mine, in use by " in message
        if sys.platform == "linux":
            assert f"process {os.getpid()}" in message
    assert train("--epochs", 1, "--out", "mine") == 0
    with claim.held(folder / "mine"):
        assert "in use by" in refusal(capsys, "--resume", "--epochs", 2, "--out", "mine")
