"""The kernels under sanitizers, with FASTVAE_SANITIZE=1: `make sanitize`.

AddressSanitizer and UndefinedBehaviorSanitizer watch the CPU loops, on every instruction set and
without one, and the CUDA loops; ThreadSanitizer watches the CPU loops on several threads.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import builds
import numpy as np
import pytest
from builds import PYTEST, at_once, run
from fingerprint import fingerprint

import fastvae

HERE = Path(__file__).parent
# Every op, dtype, parameter and layout, forward and backward.
TABLE = f"import sys; sys.path.insert(0, {str(HERE)!r}); from {{0}} import {{1}}; {{1}}()"
CPU_TABLE = (sys.executable, "-c", TABLE.format("fingerprint", "fingerprint"))
CUDA_TABLE = (sys.executable, "-c", TABLE.format("cuda_on_host.bits", "bits"))
# Every width, empty tensors, broadcasting, values at the limits: what the tables above do not have.
ELSEWHERE = ("test_values[", "test_gradients[", "layouts", "gradcheck", "rejects")
OTHERS = (*PYTEST, "-k", " and ".join(f"not {word}" for word in ELSEWHERE))
FILES = ("gradients", "values", "weights", "broadcasting", "packed", "extremes", "nll_loss")

JOBS = {
    "cuda_asan table": CUDA_TABLE,
    **{f"cuda_asan {name}": (*OTHERS, HERE / f"test_{name}.py") for name in FILES},
    "cpu_tsan table": CPU_TABLE,
    "cpu_tsan threads": (*PYTEST, HERE / "test_threads.py", "-k", "test_calls"),
    **{f"cpu_asan {name} table": CPU_TABLE for name in ("avx512", "avx2")},
    **{
        f"cpu_asan {name}": (*OTHERS, HERE / f"test_{name}.py")
        for name in (*FILES, "inputs", "poison")
    },
}

pytestmark = [
    pytest.mark.skipif(os.environ.get("FASTVAE_SANITIZE") != "1", reason="make sanitize runs it"),
    pytest.mark.skipif(sys.platform != "linux", reason="fibers and linking are those of Linux"),
    pytest.mark.skipif(shutil.which(builds.CXX) is None, reason=f"there is no {builds.CXX}"),
    pytest.mark.skipif(not fastvae.backend.native_enabled(), reason="the kernels are not built"),
]


def run_job(name: str) -> str:
    build, *instructions = name.split()[:-1]
    settings = {"FASTVAE_CPU_CAPABILITY": instructions[0]} if instructions else {}
    return run(builds.BUILD / build, *JOBS[name], **settings)


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    wanted = [i.callspec.params["name"] for i in request.session.items if "test_clean[" in i.name]
    for build in dict.fromkeys(name.split()[0] for name in wanted):
        builds.build(build)  # on all cores
    with at_once({name: partial(run_job, name) for name in wanted}) as started:
        yield started


@pytest.mark.parametrize("name", JOBS)
def test_clean(name: str, jobs: dict[str, Future[str]]) -> None:
    output = jobs[name].result()
    assert "passed" in output or "table" in name


def test_the_portable_table_under_asan_gives_the_same_bits(tmp_path: Path) -> None:
    """The loop that other processors than those of x86 have, where one is x86."""
    folder, file = builds.build("portable_asan"), tmp_path / "bits.npz"
    run(folder, sys.executable, HERE / "fingerprint.py", file)
    right = fingerprint()
    with np.load(file) as found:
        assert str(found["capability"]) == "baseline"
        wrong = [name for name in right if not np.array_equal(found[name], right[name])]
    assert wrong == []


@pytest.mark.parametrize("program", ["cuts", "far"])
def test_index_arithmetic_of_cuda_asan(program: str) -> None:
    folder = builds.build("cuda_asan")
    assert run(folder, folder / program) == "right\n"


# ---- Negative controls --------------------------------------------------------------------------

TOO_SHORT = """
import numpy as np, torch, fastvae
short = np.lib.stride_tricks.as_strided(np.zeros(100, "f4"), (2, 64))
fastvae.kl_divergence(torch.from_numpy(short), 0.0)
"""


MISALIGNED = """
import numpy as np, torch, fastvae
crooked = np.frombuffer(bytearray(5), "f4", 1, offset=1)
fastvae.kl_divergence(torch.zeros(2, 3), torch.from_numpy(crooked))
"""


@pytest.mark.parametrize("build", ["cpu_asan", "cuda_asan"])
def test_reading_past_the_end_is_reported(build: str) -> None:
    with pytest.raises(AssertionError, match="SUMMARY: AddressSanitizer"):
        run(builds.build(build), sys.executable, "-c", TOO_SHORT)


@pytest.mark.parametrize("build", ["cpu_asan", "cuda_asan"])
def test_undefined_behaviour_is_reported(build: str) -> None:
    with pytest.raises(AssertionError, match="runtime error: load of misaligned address"):
        run(builds.build(build), sys.executable, "-c", MISALIGNED)


def test_a_race_is_reported_by_cpu_tsan() -> None:
    with pytest.raises(AssertionError, match="SUMMARY: ThreadSanitizer: data race"):
        run(builds.build("cpu_tsan"), *CPU_TABLE, STD_THREADS_OVERLAP="1")
