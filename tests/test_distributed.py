"""Two processes: DDP, FSDP2, DTensor, and the trainer under torchrun."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from distributed_checks import CHECKS

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={processes}", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture(scope="module")
def report() -> str:
    done = torchrun(str(ROOT / "tests" / "distributed_checks.py"))
    return done.stdout + done.stderr


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_processes(check: str, report: str) -> None:
    for rank in range(2):
        assert f"rank {rank} {check}: ok" in report, report


# ---- The trainer ---------------------------------------------------------------------------------


def train(folder: Path, *options: str) -> str:
    done = torchrun(
        *("-m", "fastvae", "train", "--out", str(folder), "--log-likelihood-samples", "10"),
        *("--batch-size", "100", "--hidden", "16", *options),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_trains_one_model(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    output = train(folder, "--epochs", "2")
    assert output.count("training on 1618 examples") == 1  # said once
    assert output.count("checkpoint  ") == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt",
        "figure.png",
        "metrics.csv",
        "report.json",
    ]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["heldout_elbo"]) > float(rows[0]["heldout_elbo"])
    assert json.loads((folder / "report.json").read_text())["active_units"] >= 0

    # Stopped after an epoch and resumed, it is the same run.
    twin = tmp_path / "twin"
    train(twin, "--epochs", "1")
    train(twin, "--epochs", "2", "--resume")
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (folder, twin)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name])
