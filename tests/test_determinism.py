"""Every result, forward and backward, is the same in every bit whatever computes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fingerprint import fingerprint

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def here() -> dict[str, np.ndarray]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    bits = fingerprint()
    torch.set_num_threads(before)
    return bits


def different(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    return [name for name in a if not np.array_equal(a[name], b[name])]


@pytest.mark.parametrize("count", [2, 3])
def test_threads(count: int, here: dict[str, np.ndarray], threads: None) -> None:
    torch.set_num_threads(count)
    assert different(here, fingerprint()) == []


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_instruction_sets(capability: str, here: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = tmp_path / "bits.npz"
    subprocess.run(
        [sys.executable, HERE / "fingerprint.py", file],
        env=os.environ | {"FASTVAE_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        check=True,
    )
    with np.load(file) as there:
        if str(there["capability"]) != capability:
            pytest.skip(f"this CPU has no {capability}")
        assert different(here, there) == []


def test_the_comparison_sees_one_bit(here: dict[str, np.ndarray]) -> None:
    name = next(iter(here))
    changed = here | {name: here[name] ^ np.uint8(1)}
    assert different(here, changed) == [name]
