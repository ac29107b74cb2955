"""Long runs: `make soak`. tests/test_soak.py runs them short.

python tests/soak.py [steps] [kills]
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import fastvae
from fastvae.training import checkpoint

ROOT = Path(__file__).parents[1]


def resident_bytes() -> int:
    """Of this process, on Linux."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def memory_growth(steps: int, warm_up: int = 500) -> int:
    """Bytes by which memory grew in `steps` training steps of a small VAE, of changing batches."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 8))
    model = fastvae.VAE(encoder, decoder, latent_shape=2)
    optimizer = torch.optim.Adam(model.parameters())
    start = 0
    for step in range(warm_up + steps):
        if step == warm_up:
            start = resident_bytes()
        optimizer.zero_grad()
        model(torch.rand(1 + step % 64, 8)).loss.backward()
        optimizer.step()
    return resident_bytes() - start


def killed_and_resumed(kills: int, epochs: int, runs: int = 1) -> list[tuple[bytes, bytes]]:
    """The metrics, without their times, of each run in peace, and of the same run among others that
    are at work in the same folder of runs at the same time, and killed and resumed again and again.

    Args:
        kills: of all runs together.
        epochs: of a run.
        runs: how many, which differ in their seeds.
    """
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as path:
        folder, seeds = Path(path), range(runs)
        began = time.monotonic()
        for seed in seeds:
            _end(_train(folder, epochs, seed, "--out", f"peace-{seed}"))
        whole = (time.monotonic() - began) / runs
        processes = {seed: _go_on(folder, epochs, seed) for seed in seeds}
        for _ in range(kills):
            time.sleep(rng.uniform(0.3, 1.0) * whole / runs)
            seed = rng.choice(seeds)
            processes[seed].kill()
            processes[seed].wait()
            processes[seed] = _go_on(folder, epochs, seed)
        for process in processes.values():
            _end(process)
        return [
            (_metrics(folder / f"peace-{seed}"), _metrics(_run_of(folder, seed))) for seed in seeds
        ]


def _go_on(folder: Path, epochs: int, seed: int) -> subprocess.Popen[bytes]:
    """With the run of that seed, or anew, if it was killed before its first checkpoint."""
    run = _run_of(folder, seed)
    return _train(folder, epochs, seed, *(["--resume", "--out", str(run)] if run else []))


def _run_of(folder: Path, seed: int) -> Path | None:
    found = [
        path.parent
        for path in folder.glob("runs/*/checkpoint.pt")
        if checkpoint.load(path)["settings"]["seed"] == seed
    ]
    assert len(found) < 2, found
    return found[0] if found else None


def _train(folder: Path, epochs: int, seed: int, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastvae", "train", "--hidden", "16", "--seed", str(seed)]
    command += ["--epochs", str(epochs), "--log-likelihood-samples", "5"]
    return subprocess.Popen(
        [*command, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"{process.args} gave {process.returncode}")


def _metrics(folder: Path | None) -> bytes:
    assert folder is not None
    lines = (folder / "metrics.csv").read_bytes().splitlines()
    return b"\n".join(line.rpartition(b",")[0] for line in lines)


if __name__ == "__main__":
    steps, kills = ([int(n) for n in sys.argv[1:]] + [100_000, 20][len(sys.argv) - 1 :])[:2]
    grown = memory_growth(steps)
    print(f"{steps} steps: memory grew by {grown / 1e6:.2f} MB")
    same = True
    for runs in (1, 3):
        curves = killed_and_resumed(kills, epochs=20, runs=runs)
        same_here = [peace == war for peace, war in curves]
        print(f"{kills} kills of {runs} at once: {sum(same_here)} of {runs} have their own curve")
        same &= all(same_here)
    sys.exit(grown > 8e6 or not same)
