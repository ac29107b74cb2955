"""`python -m fastvae train`: what a run computes, leaves behind, survives and refuses."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastvae
from fastvae import checkpoint, data
from fastvae.cli import main
from fastvae.options import add_arguments
from fastvae.settings import LIKELIHOODS, SIGMAS, Settings
from fastvae.train import _settings
from fastvae.trainer import COLUMNS, Trainer

SMALL = (
    *("--hidden", "32", "--latent-dim", "3", "--batch-size", "128"),
    *("--log-likelihood-samples", "20", "--device", "cpu"),
)
FILES = {"checkpoint.pt", "metrics.csv", "figure.png", "report.json"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*options: object) -> int:
    return main(["train", *SMALL, *map(str, options)])


def metrics(out: Path | str) -> list[dict[str, float]]:
    with open(Path(out) / "metrics.csv", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def timeless(state: Any) -> Any:
    """A checkpoint's content without durations, in a form that == compares bit for bit."""
    if isinstance(state, torch.Tensor):
        return state.shape, state.dtype, state.numpy().tobytes()
    if isinstance(state, dict):
        return {key: timeless(value) for key, value in state.items() if key != "seconds"}
    if isinstance(state, list):
        return [timeless(value) for value in state]
    return state


def final_state(out: Path | str) -> Any:
    return timeless(checkpoint.load(Path(out) / "checkpoint.pt"))


def refusal(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """The one message of a command line that is wrong."""
    with pytest.raises(SystemExit) as stop:
        train(*options)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.rpartition("error: ")[2]


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
    assert len(trainer.heldout) + len(trainer.train) == len(x)
    together = torch.cat([trainer.heldout, trainer.train])
    assert torch.equal(together, x[trainer.split(len(x), 0)])
    row = trainer.run_epoch()
    with torch.no_grad():
        rate = trainer.model.encode(trainer.heldout).kl().mean().item()
    assert row["heldout_rate"] == pytest.approx(rate, rel=1e-5)
    assert trainer.evaluate()["heldout_elbo"] == row["heldout_elbo"]


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


# ---- Backends and data ---------------------------------------------------------------------------


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


def test_arrays_and_folders_of_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(20, 6, 5, 3), dtype=np.uint8)
    np.savez("named.npz", x_train=images, y_train=np.arange(20) % 2)
    np.save("grey.npy", images[..., 0] / 255)
    np.savez("single.npz", anything=images[:, 0, :, 0] > 128)
    for i, image in enumerate(images):
        path = folder / "pictures" / ("even", "odd")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    named, grey = data.load("named.npz"), data.load("grey.npy")
    torch.testing.assert_close(named.x, torch.from_numpy(images / np.float32(255)))
    torch.testing.assert_close(grey.x, named.x[..., 0])
    assert grey.labels is None
    assert data.load("single.npz").x.unique().tolist() == [0, 1]
    pictures = data.load("pictures")
    torch.testing.assert_close(pictures.x, torch.cat([named.x[::2], named.x[1::2]]))
    assert pictures.labels is not None
    assert pictures.labels.tolist() == ["even"] * 10 + ["odd"] * 10

    for name in ("named.npz", "single.npz", "pictures"):
        for latent in (1, 2):
            out = f"{name}-{latent}"
            assert train("--data", name, "--epochs", 1, "--latent-dim", latent, "--out", out) == 0
            assert {path.name for path in Path(out).iterdir()} == FILES


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(9), r"has shape [9]; want [N, D]"),
        (np.zeros((1, 9)), r"has shape [1, 9]; want [N, D]"),
        (np.zeros((9, 0)), r"has shape [9, 0]; want [N, D]"),
        (np.zeros((9, 2, 2, 7)), r"has shape [9, 2, 2, 7]; want [N, D]"),
        (np.zeros((9, 4), int), "has dtype int64; want uint8, bool or floating-point"),
        (np.zeros((9, 4), complex), "has dtype complex128; want"),
        (np.array([[1, 2], [3, np.nan]]), "NaN or infinite values in 1 of 2 examples, the first"),
        (np.full((9, 4), 1e300), "NaN or infinite values in 9 of 9 examples"),
        (np.array([{}, {}], dtype=object), "is not readable; want an .npz or .npy file"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("bad.npy", array)
    printed = refusal(capsys, "--data", "bad.npy")
    assert printed.startswith("argument --data: ")
    assert "bad.npy" in printed
    assert message in printed
    assert not Path("runs").exists()


def test_bad_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.npz' does not exist; want" in refusal(capsys, "--data", "nowhere.npz")
    (folder / "text.npz").write_text("text")
    assert "text.npz is not readable; want" in refusal(capsys, "--data", "text.npz")
    np.savez("two.npz", a=np.zeros((9, 4)), b=np.zeros(9))
    assert "arrays ['a', 'b']; want one named 'x'" in refusal(capsys, "--data", "two.npz")
    np.savez("labels.npz", x=np.zeros((9, 4)), y=np.zeros(8))
    assert "labels of shape [8]; want [9]" in refusal(capsys, "--data", "labels.npz")
    (folder / "images").mkdir()
    assert "images holds no images; want files .png" in refusal(capsys, "--data", "images")
    for size in (4, 5):
        Image.new("L", (size, 4)).save(folder / "images" / f"{size}.png")
    assert "has shape [4, 5], 4.png has [4, 4]" in refusal(capsys, "--data", "images")


# ---- Models, objectives and sweeps on real data --------------------------------------------------


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


# ---- Wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", 0), "argument --epochs: is '0'; want a whole number above 0"),
        (("--latent-dim", 1.5), "argument --latent-dim: is '1.5'; want a whole number above 0"),
        (("--sigma", "nan"), "argument --sigma: is 'nan'; want a number above 0, or learned"),
        (("--lr", "inf"), "argument --lr: is 'inf'; want a number above 0"),
        (("--beta", -1), "argument --beta: is '-1'; want a number of at least 0"),
        (("--seed", 2**63), "argument --seed: is '9223372036854775808'; want"),
        (("--device", "abacus"), "argument --device: is 'abacus'; want a device of this machine"),
        (("--device", "meta"), "argument --device: is 'meta'; want a device of this machine"),
        (("--backend", "fast"), "argument --backend: invalid choice: 'fast'"),
        (("--layers", -1), "argument --layers: is '-1'; want a whole number of at least 0"),
        (("--sigma", "tiny"), "argument --sigma: is 'tiny'; want a number above 0, or learned, "),
        (("--prior", "flat"), "argument --prior: invalid choice: 'flat'"),
        (("--objective", "iwae", "--beta", 2), "objective iwae has no weighted KL; want no beta"),
        (("--objective", "stl", "--warmup", 2), "objective stl has no weighted KL; want no beta"),
        (("--capacity", 2, "--free-bits", 1), "capacity and free bits are both given; want one"),
        (("--free-bits", 1, "--prior", "vamp"), "free bits need the KL of each latent dimension"),
        (("--likelihood", "bernoulli", "--sigma", "optimal"), "sigma is optimal, likelihood bern"),
        (("--cycles", 2), "cycles are given without a warm-up; want the epochs of one ramp too"),
        (
            ("--sweep-beta", 1, "--sweep-samples", 2),
            "argument --sweep-samples: --sweep-beta is given; want one of them",
        ),
        (("--resume", "--sweep-beta", 1), "argument --resume: no run of digits-sweep-beta"),
        (("--resume",), "argument --resume: no run of digits in runs; want --out"),
        (("--resume", "--out", "x"), "argument --resume: x/checkpoint.pt does not exist; want"),
    ],
)
def test_bad_options(
    options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *options).startswith(message)
    assert not Path("runs").exists()


def test_bad_resumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("a.npy", np.eye(8))
    assert train("--epochs", 2, "--data", "a.npy", "--out", "run") == 0
    before = (folder / "run/checkpoint.pt").read_bytes()

    def resumed(*options: object) -> str:
        return refusal(capsys, "--resume", "--out", "run", *options)

    assert "argument --latent-dim: is 4; want the resumed run's 3" in resumed("--latent-dim", 4)
    assert "argument --hidden: is 64; want the resumed run's 32" in resumed("--hidden", 64)
    assert "argument --sigma: is 0.5; want the resumed run's 0.2" in resumed("--sigma", 0.5)
    assert "argument --data: is digits; want the resumed run's" in resumed("--data", "digits")
    assert "argument --epochs: is 1; want at least the resumed run's 2" in resumed("--epochs", 1)
    np.save("a.npy", 2 * np.eye(8))
    assert "has shape and checksum [8, 8]" in resumed()
    assert (folder / "run/checkpoint.pt").read_bytes() == before
    (folder / "run/checkpoint.pt").write_bytes(before[:1000])
    assert "run/checkpoint.pt is damaged or no checkpoint" in resumed()
    torch.save({"weights": torch.zeros(2)}, folder / "run/checkpoint.pt")
    assert "no checkpoint of this version" in resumed()


def test_native_backend_without_a_binary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastvae.backend._binary", None)
    assert refusal(capsys, "--backend", "native").startswith("argument --backend: use_backend")


def test_missing_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tqdm" else name)
    printed = refusal(capsys)
    assert printed == "not installed: tqdm; want pip install 'fastvae-kernels[train]'\n"
