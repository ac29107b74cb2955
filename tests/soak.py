"""Long runs: `make soak`. tests/test_soak.py runs them short.

python tests/soak.py [steps] [kills]
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import fastvae

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


def killed_and_resumed(kills: int, epochs: int, seed: int = 0) -> tuple[bytes, bytes]:
    """The metrics, without their times, of a run in peace, and of one killed again and again."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        peace, war = Path(folder, "peace"), Path(folder, "war")
        began = time.monotonic()
        _train(peace, epochs, resume=False).wait()
        whole = time.monotonic() - began
        for _ in range(kills):
            process = _train(war, epochs, resume=(war / "checkpoint.pt").exists())
            time.sleep(rng.uniform(0.3, 1.0) * whole)
            process.kill()
            process.wait()
        if not (war / "checkpoint.pt").exists():
            shutil.rmtree(war, ignore_errors=True)
        _train(war, epochs, resume=(war / "checkpoint.pt").exists()).wait()
        return _metrics(peace), _metrics(war)


def _train(folder: Path, epochs: int, *, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastvae", "train", "--out", str(folder), "--hidden", "16"]
    command += ["--epochs", str(epochs), "--log-likelihood-samples", "5"]
    return subprocess.Popen(
        [*command, *(["--resume"] if resume else [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _metrics(folder: Path) -> bytes:
    lines = (folder / "metrics.csv").read_bytes().splitlines()
    return b"\n".join(line.rpartition(b",")[0] for line in lines)


if __name__ == "__main__":
    steps, kills = ([int(n) for n in sys.argv[1:]] + [100_000, 20][len(sys.argv) - 1 :])[:2]
    grown = memory_growth(steps)
    print(f"{steps} steps: memory grew by {grown / 1e6:.2f} MB")
    peace, war = killed_and_resumed(kills, epochs=20)
    print(f"{kills} kills: the run is {'the same' if peace == war else 'NOT THE SAME'}")
    sys.exit(grown > 8e6 or peace != war)
