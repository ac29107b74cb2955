"""tests/soak.py, short."""

from __future__ import annotations

import sys

import pytest
import torch
from soak import killed_and_resumed, memory_growth, resident_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_does_not_grow(threads: None) -> None:
    assert memory_growth(2000) < 4e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_growth_would_be_seen() -> None:
    """The negative control, in pieces so large that none comes from what the heap has free."""
    start = resident_bytes()
    leak = [torch.ones(1 << 24) for _ in range(4)]
    assert resident_bytes() - start > 1e8
    assert len(leak) == 4


def test_killed_runs_go_on_as_if_nothing_had_been() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    curves = killed_and_resumed(kills=2, epochs=2, runs=2)
    assert len({peace for peace, _ in curves}) == len(curves) == 2
    for peace, war in curves:
        assert peace.count(b"\n") == 2
        assert peace == war
