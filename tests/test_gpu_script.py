"""benchmarks/gpu.py, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert script.main() == 1
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_programs_are_checked(script: ModuleType, direction: str) -> None:
    for op, *_ in script.CASES:
        shape = script.Shape.parse("2x3x4x5" if op.startswith("colour") else "16x64")
        case = script.Case(script.OPS[op], shape, torch.float32, direction, device="cpu")
        sets = script.inputs.make_inputs(case, cache_bytes=1 << 16)
        for name in ("fastvae", "copy", "eager"):
            script.checked(script.make_program(name, case, sets), case, sets)


def test_the_table_has_what_was_measured_and_what_was_refused(script: ModuleType) -> None:
    def figures(median: float) -> dict[str, object]:
        spread = {"median": median, "low": median, "high": median}
        cost = {"kernels": 2, "peak_bytes": 3 << 20}
        return {"seconds": spread, "gb_per_s": 1e-9 / median, "share_of_copy": 0.5, **cost}

    entry = {"op": "rsample_kl", "shape": "2x3", "dtype": "float32", "direction": "forward"}
    programs = {"fastvae": figures(1e-6), "copy": figures(5e-7), "eager": figures(4e-6)}
    table = script.markdown(
        {
            "machine": {"gpu": "A GPU", "date": "today", "commit": "abc", "torch": "2.11"},
            "tests": {"status": 0, "summary": "5 passed"},
            "sanitizer": {"memcheck": {"status": 0, "summary": "0 errors"}},
            "noise_bits_equal": True,
            "kernels": [
                {**entry, "programs": programs, "refused": {}},
                {**entry, "programs": {}, "refused": {"fastvae": "WrongResult: z"}},
            ],
        }
    )
    assert "- tests: 5 passed\n- memcheck: 0 errors" in table
    assert "| forward | 1.0 | 0 | 50.0% | 2 | 3 | 4.00 |" in table
    assert "refused: WrongResult: z" in table
