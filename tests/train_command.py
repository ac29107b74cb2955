"""`python -m fastvae train` for tests: short runs in the current folder, and what they leave."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvae.cli import main
from fastvae.training import checkpoint

__all__ = ["FILES", "SMALL", "final_state", "metrics", "refusal", "timeless", "train"]

SMALL = (
    *("--hidden", "32", "--latent-dim", "3", "--batch-size", "128"),
    *("--log-likelihood-samples", "20", "--device", "cpu"),
)
FILES = {"checkpoint.pt", "metrics.csv", "figure.png", "report.json"}


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
