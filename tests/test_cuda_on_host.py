"""The CUDA loops, compiled for the CPU (tests/cuda_on_host), give what the CPU's own loops give."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import builds
import numpy as np
import pytest
from builds import PYTEST, at_once, run
from cuda_on_host.bits import bits

import fastvae

HERE = Path(__file__).parent
# Each is a process: to begin one takes longer than most of these files.
TABLES = {
    "gradients": ("gradients", "weights"),
    "values": ("values", "noise", "packed", "broadcasting", "extremes", "nll_loss"),
    "log-sums": ("mixtures", "items", "colours", "categoricals", "straight_through"),
}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="fibers and linking are those of Linux"),
    pytest.mark.skipif(shutil.which(builds.CXX) is None, reason=f"there is no {builds.CXX}"),
    pytest.mark.skipif(not fastvae.backend.native_enabled(), reason="nothing to compare with"),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return builds.build("cuda")


def bits_in(folder: Path, file: Path, **settings: str) -> dict[str, np.ndarray]:
    run(folder, sys.executable, HERE / "cuda_on_host" / "bits.py", file, **settings)
    with np.load(file) as found:
        return {name.replace("|", "/"): found[name] for name in found}


def different(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not np.array_equal(a[name], b[name])]


@pytest.fixture(scope="module")
def on_host(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return bits_in(folder, tmp_path_factory.mktemp("bits") / "bits.npz")


@pytest.fixture(scope="module")
def tables(folder: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """The output of each table that is wanted."""
    wanted = [i.callspec.params["name"] for i in request.session.items if "test_table[" in i.name]
    # All layouts and types are in the table of bits, where elements are held to the CPU's; sums of
    # float16 are cut as those of bfloat16, and those of float64, but for their type, as the single
    # elements of float32.
    # Second derivatives are the reference's.
    left_out = ("layouts", "gradients_of_every_width", "torch.float16", "gradgradcheck")

    def table(name: str) -> Callable[[], str]:
        twins = ("torch.float64",) if name == "gradients" else ()
        words = " and ".join(f"not {word}" for word in (*left_out, *twins))
        files = [HERE / f"test_{file}.py" for file in TABLES[name]]
        return partial(run, folder, *PYTEST, "-k", words, *files)

    with at_once({name: table(name) for name in wanted}) as jobs:
        yield jobs


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str, tables: dict[str, Future[str]]) -> None:
    assert "passed" in tables[name].result()


def test_element_by_element_the_same_bits_as_the_cpu(on_host: dict[str, np.ndarray]) -> None:
    differing = different(bits(), on_host)
    assert [name for name in differing if name.startswith("each")] == []
    # Sums are taken in another order: had all been equal, one binary would have computed both.
    assert [name for name in differing if name.startswith("sum")] != []


def test_order_of_blocks_and_warps_changes_nothing(
    folder: Path, on_host: dict[str, np.ndarray], tmp_path: Path
) -> None:
    # Another block is then the last to come, and adds up what all have found.
    reversed_order = bits_in(folder, tmp_path / "bits.npz", CUDA_ON_HOST_REVERSED="1")
    assert different(on_host, reversed_order) == []


@pytest.mark.parametrize("program", ["cuts", "far"])
def test_cuts_cover_everything_also_past_two_to_the_31(program: str, folder: Path) -> None:
    assert run(folder, folder / program) == "right\n"


# ---- The stand-in for CUDA itself ---------------------------------------------------------------


@pytest.mark.parametrize("order", [{}, {"CUDA_ON_HOST_REVERSED": "1"}], ids=str)
def test_barriers_hold_and_missing_ones_show(order: dict[str, str], folder: Path) -> None:
    output = run(folder, folder / "barriers", **order)
    found = dict(line.split(": ", 1) for line in output.splitlines())
    assert found["both barriers"] == found["both barriers again"] == "right"
    assert found["no first barrier"] == found["no second barrier"] == "wrong"
    for name, problem in (
        ("one thread ends early", "waits at __syncthreads"),
        ("one lane ends early", "waits at __shfl_xor_sync"),
        ("one lane makes a round more", "waits at __shfl_xor_sync"),
        ("warps at two barriers", "waits at __syncthreads"),
    ):
        assert problem in found[name]
        assert ", but thread" in found[name]
