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
    """The negative control: 1 kB a step."""
    start = resident_bytes()
    leak = [torch.ones(256) for _ in range(20_000)]
    assert resident_bytes() - start > 4e6
    assert len(leak) == 20_000


def test_a_killed_run_goes_on_as_if_nothing_had_been() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    peace, war = killed_and_resumed(kills=1, epochs=2)
    assert peace.count(b"\n") == 2
    assert peace == war
