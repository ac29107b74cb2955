"""Every script of examples/ runs, learns and draws its picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


class Example(NamedTuple):
    epochs: int
    line: float
    """Nats that the held-out ELBO is below after the first epoch and above after the last: a
    script that does not learn, or does not have to, fails."""
    needs: str | None = None
    processes: int | None = None


CASES = {
    "conditional": Example(3, -8),
    "counts": Example(3, -640),
    "hierarchy": Example(6, -8),
    "lightning_module": Example(3, -6, needs="lightning"),
    "plain_loop": Example(3, -14),
    "total_correlation": Example(3, 43),
    "two_processes": Example(3, -14, processes=2),
    "vamp_prior": Example(3, -8),
}


def run(name: str, folder: Path, *arguments: str) -> str:
    """What the script prints."""
    example = CASES[name]
    command = [sys.executable]
    if example.processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={example.processes}"]
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def learned(output: str, line: float) -> bool:
    """Whether the last held-out ELBO that is reported rose above a line from below."""
    *_, (first, last) = re.findall(r"ELBO (-?[\d.]+) -> (-?[\d.]+) nats", output)
    return float(first) < line < float(last)


@pytest.mark.parametrize("name", CASES)
def test_an_example_learns_and_draws(name: str, tmp_path: Path) -> None:
    for module in ("sklearn", "matplotlib", CASES[name].needs):
        if module:
            pytest.importorskip(module)
    if CASES[name].processes and not (
        torch.distributed.is_available() and torch.distributed.is_gloo_available()
    ):
        pytest.skip("needs torch.distributed with gloo")
    output = run(name, tmp_path, "--epochs", str(CASES[name].epochs))
    assert learned(output, CASES[name].line), output

    from matplotlib.image import imread

    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]
    picture = imread(tmp_path / f"{name}.png")
    assert min(picture.shape[:2]) > 200
    assert picture[..., :3].std() > 0.05  # not blank


def test_what_does_not_learn_fails() -> None:
    line = CASES["plain_loop"].line
    assert learned("held-out ELBO -24.18 -> -5.98 nats, in x.png", line)
    assert not learned("held-out ELBO -24.18 -> -24.20 nats, in x.png", line)
    assert not learned("held-out ELBO -5.00 -> -5.98 nats, in x.png", line)


def test_every_example_is_tested_and_in_the_gallery() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(CASES)
    gallery = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"examples/(\w+)\.png", gallery))
    assert names == shown
    for name in names:
        assert (ROOT / "docs" / "examples" / f"{name}.png").stat().st_size < 100_000
