"""`python -m fastvae train --resume`: which run goes on, and what is never lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from train_command import FILES, final_state, metrics, refusal, train

from fastvae import files
from fastvae.training import checkpoint, claim, data

pytestmark = pytest.mark.usefixtures("folder", "no_pictures")


def save_data(name: str, seed: int = 0) -> None:
    np.save(name, np.random.default_rng(seed).random((40, 6)).astype(np.float32))


def epochs(out: str) -> int:
    return len(metrics(out))


# ---- Which run -----------------------------------------------------------------------------------


def test_the_latest_run_goes_on() -> None:
    save_data("mine.npy")
    assert train("--epochs", 1) == 0
    assert train("--epochs", 1, "--data", "mine.npy") == 0
    before = final_state("runs/digits")
    assert train("--epochs", 2, "--resume") == 0
    assert final_state("runs/digits") == before
    assert epochs("runs/mine") == 2
    assert train("--epochs", 2, "--resume", "--data", "digits") == 0  # the latest of those
    assert epochs("runs/digits") == 2
    assert train("--epochs", 3, "--resume") == 0
    assert epochs("runs/digits") == 3


def test_data_that_are_called_like_a_run() -> None:
    """The second run on the digits is runs/digits-2."""
    assert train("--epochs", 1) == 0
    assert train("--epochs", 1) == 0
    save_data("digits-2.npy")
    assert train("--epochs", 1, "--data", "digits-2.npy") == 0
    assert train("--epochs", 2, "--resume", "--data", "digits") == 0
    assert [epochs(f"runs/{name}") for name in ("digits", "digits-2", "digits-2-2")] == [1, 2, 1]
    assert train("--epochs", 3, "--resume", "--data", "digits-2.npy") == 0
    assert epochs("runs/digits-2-2") == 3


def test_a_sweep_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--epochs", 1) == 0
    assert train("--epochs", 1, "--sweep-beta", 1, 2) == 0
    message = refusal(capsys, "--resume", "--epochs", 2)
    assert "the latest is a run of the sweep runs/digits-sweep-beta; want --sweep-beta" in message
    assert train("--epochs", 2, "--resume", "--out", "runs/digits") == 0
    assert train("--epochs", 2, "--resume", "--sweep-beta", 1, 2) == 0
    assert epochs("runs/digits-sweep-beta/beta-2.0") == 2
    message = refusal(capsys, "--resume", "--sweep-beta", 3, "--out", "runs/digits-sweep-beta")
    assert "argument --resume: runs/digits-sweep-beta holds no run of such a sweep" in message


def test_data_that_have_moved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_data("old.npy")
    save_data("other.npy", seed=1)
    assert train("--epochs", 2, "--data", "old.npy", "--out", "whole") == 0
    assert train("--epochs", 1, "--data", "old.npy", "--out", "run") == 0
    Path("old.npy").rename("new.npy")
    message = refusal(capsys, "--resume", "--out", "run")
    assert "old.npy' does not exist any more; want --data with where the data are now" in message
    message = refusal(capsys, "--resume", "--out", "run", "--data", "other.npy")
    assert "has shape and checksum [40, 6]" in message
    assert train("--epochs", 2, "--resume", "--out", "run", "--data", "new.npy") == 0
    assert final_state("run")["model"] == final_state("whole")["model"]
    assert train("--epochs", 3, "--resume", "--out", "run") == 0  # known from now on


def test_the_rest_of_a_sweep_is_like_its_runs() -> None:
    """Those that had not begun take data and settings from those that had."""
    save_data("mine.npy")
    options = ("--sweep-beta", 1, 2, "--out", "sweep")
    assert train(*options, "--data", "mine.npy", "--epochs", 3, "--lr", 0.01) == 0
    whole = final_state("sweep/beta-2.0")
    for name in FILES:
        Path("sweep/beta-2.0", name).unlink()
    assert train(*options, "--resume") == 0
    assert final_state("sweep/beta-2.0") == whole


def test_checkpoints_of_other_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--epochs", 1, "--out", "run") == 0
    path = Path("run/checkpoint.pt")
    state = checkpoint.load(path)
    del state["format"]
    settings = state["settings"]
    checkpoint.save(path, {**state, "settings": {**settings, "fancy": 1}})
    message = refusal(capsys, "--resume", "--out", "run")
    assert "the run has the setting fancy, which this version of fastvae does not know" in message
    model = {**state["model"], "encoder.1.weight": torch.zeros(2, 2)}
    checkpoint.save(path, {**state, "model": model})
    message = refusal(capsys, "--resume", "--out", "run")
    assert "the checkpoint's weights are not those of the model" in message
    assert message.count("\n") == 1


# ---- What stops a run ----------------------------------------------------------------------------


def test_interrupted_before_there_is_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--epochs", 1) == 0
    capsys.readouterr()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    assert train("--epochs", 1) == 130
    assert capsys.readouterr().err == "\ninterrupted; nothing was saved yet\n"
    assert train("--epochs", 2, "--resume") == 130
    assert capsys.readouterr().err == "\ninterrupted; to go on: --resume --out runs/digits\n"


def test_an_interrupted_sweep_says_all_of_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: torch.optim.Adam) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    assert train("--sweep-beta", 1, 2, "--epochs", 1) == 130
    said = "interrupted; to go on: --resume --out runs/digits-sweep-beta --sweep-beta 1.0 2.0\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_full_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was written before stays, and the run goes on from it."""
    assert train("--epochs", 3, "--out", "whole") == 0
    calls, fsync = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # checkpoint and metrics at first and after each epoch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert train("--epochs", 3) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == (
        "stopped: [Errno 28] No space left on device: 'runs/digits/checkpoint.pt'; to go on: "
        "--resume --out runs/digits"
    )
    assert {path.name for path in (folder / "runs/digits").iterdir()} == {
        "checkpoint.pt",
        "metrics.csv",
    }
    assert epochs("runs/digits") == 1
    assert train("--resume") == 0
    assert final_state("runs/digits") == final_state("whole")


@pytest.mark.parametrize("name", ["figure.png", "report.json"])
def test_a_disk_that_is_full_at_the_end(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        assert train("--epochs", 1) == 1
    assert f"No space left on device: 'runs/digits/{name}'; to go on" in capsys.readouterr().err
    assert not list((folder / "runs/digits").glob("*.tmp"))
    assert train("--resume") == 0
    assert {path.name for path in (folder / "runs/digits").iterdir()} == FILES


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert "argument --out: " in refusal(capsys, "--out", "file/run")
    Path("runs").write_text("")
    assert "argument --out: " in refusal(capsys)


def test_more_memory_than_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--hidden", 2**31 - 1, "--layers", 1) == 1
    message = capsys.readouterr().err
    assert "stopped: " in message
    assert "allocate memory" in message
    assert "nothing was saved yet" in message
    assert not (folder / "runs").exists()


def test_a_run_is_held_before_its_checkpoint_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else it could be one of before the other process's last epochs."""
    assert train("--epochs", 1, "--out", "run") == 0
    read = []
    monkeypatch.setattr(checkpoint, "load", lambda path: read.append(path))
    with claim.held(Path("run")):
        assert "in use by" in refusal(capsys, "--resume", "--out", "run")
    assert not read
