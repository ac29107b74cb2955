"""What can be said of the CUDA kernels without running them: registers, accesses, instructions."""

from __future__ import annotations

import pytest
from cuda_binary import SIZES, find_binary, find_tool
from cuda_log_sums import LOG_SUMS, log_sum_kernels, log_sum_markdown
from cuda_resources import STEPS, Kernel, kernels, markdown

import fastvae

LOOP = """
    LDG.E.128.CONSTANT R4, desc[UR6][R4.64]
    @P1 BRA `(.L_x_2)
    FFMA R4, R4, R5, R6
    FFMA R5, R5, R5, R6
    IADD3 R0, R0, 0x100, RZ
    STG.E.128 desc[UR6][R8.64], R4
    @!P0 BRA `(.L_x_1)
    EXIT
    FADD R4, R4, R5
    BRA `(.L_x_1)
"""


def kernel(**changes: object) -> Kernel:
    """A copy, whose second way around its loop is a special case."""
    instructions = [line.strip() for line in LOOP.strip().splitlines()]
    fields = {
        "step": "KLDivergence<4>::Backward",
        "dtype": "float",
        "sums": "none",
        "width": 1,
        "logarithmic": True,
        "one_scale": False,
        "bounded": False,
        "registers": 64,
        "local_bytes": 0,
        "instructions": ["MOV R1, R2", *instructions],
        "labels": {".L_x_1": 1, ".L_x_2": 9},
    }
    return Kernel(**(fields | changes))


def test_every_kernel() -> None:
    if not fastvae.backend.HAS_CUDA:
        pytest.skip("the binary has no CUDA kernels")
    if not find_tool("cuobjdump") or not find_tool("nvdisasm"):
        pytest.skip("cuobjdump and nvdisasm are not installed")
    found = kernels(find_binary())
    if not found:
        pytest.skip("the binary was built for other architectures")
    assert {k.name: k.problems() for k in found if k.problems()} == {}
    assert {(k.step, k.dtype) for k in found} == {(s, t) for s in STEPS for t in SIZES}
    assert {(k.step, k.dtype) for k in found if k.wide} == {
        (step, dtype) for step in STEPS for dtype, size in SIZES.items() if size <= 4
    }
    assert all(0.05 < k.predicted <= 1 for k in found if k.wide)
    assert markdown(found).count("\n") > 2 * len(STEPS)
    log_sums = log_sum_kernels(find_binary())
    assert {k.name.partition(",")[0] for k in log_sums} == {*LOG_SUMS}
    assert {k.name: k.local_bytes for k in log_sums if k.local_bytes} == {}
    assert log_sum_markdown(log_sums).count("\n") == len(log_sums) + 1


def test_the_usual_way_through_a_loop() -> None:
    copy = kernel(step="Rsample::Backward", width=4, dtype="HalfBits")
    assert len(copy.main_loop) == 7
    assert copy.slots_per_element == 7 / 4


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"local_bytes": 8}, "spills"),
        ({"instructions": ["STL [R1], R2", "EXIT"]}, "spills"),
        ({"width": 4, "instructions": ["LDG.E R4, [R4]", "EXIT"], "labels": {}}, "no loop of 128"),
    ],
    ids=str,
)
def test_what_is_wrong_shows(changes: dict[str, object], problem: str) -> None:
    assert kernel().problems() == []
    assert problem in "; ".join(kernel(**changes).problems())
