"""What is built where: for the GPUs present or the CPU, and with nvcc from the index if need be."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("FASTVAE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "MAKEFLAGS")
CLEAN = {name: value for name, value in os.environ.items() if name not in NAMES}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source folder")


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with what stands in for an NVIDIA driver and three GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    smi.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("has_driver", "wishes", "built_for"),
    [
        (False, {}, "0 "),
        (True, {}, " 8.6;9.0"),
        (False, {"FASTVAE_CUDA": "1"}, "1 "),
        (True, {"FASTVAE_CUDA": "0"}, "0 "),
        (False, {"TORCH_CUDA_ARCH_LIST": "9.0"}, " 9.0"),
        (True, {"TORCH_CUDA_ARCH_LIST": "8.0+PTX"}, " 8.0+PTX"),
    ],
)
def test_make_builds_for_what_is_here(
    has_driver: bool, wishes: dict[str, str], built_for: str, driver: Path, tmp_path: Path
) -> None:
    if not has_driver:
        (driver / "nvidia-smi").write_text("#!/bin/sh\necho no devices were found\nexit 9\n")
    path = f"{driver}{os.pathsep}{CLEAN['PATH']}"
    done = subprocess.run(
        ["make", "-n", "build", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        env=CLEAN | {"PATH": path} | wishes,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f'echo "{built_for}" >' in done.stdout


@pytest.mark.parametrize(
    ("nvcc", "driver_here", "wish", "asked"),
    [
        (None, True, "", True),
        (None, False, "", False),
        (None, False, "1", True),
        (None, True, "0", False),
        ("/usr/bin/nvcc", True, "", False),
    ],
)
def test_an_isolated_build_asks_for_nvcc(
    nvcc: str | None, driver_here: bool, wish: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("setuptools")
    backend = runpy.run_path(str(ROOT / "tools" / "build_backend.py"))
    toolkit = runpy.run_path(str(ROOT / "fastvae" / "cuda_toolkit.py"))
    toolkit |= {"find_nvcc": lambda: nvcc, "has_driver": lambda: driver_here}
    monkeypatch.setattr(runpy, "run_path", lambda path: toolkit)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("FASTVAE_CUDA", wish)
    wanted = list(toolkit["REQUIREMENTS"]) if asked else []
    assert backend["get_requires_for_build_wheel"]() == wanted
    assert backend["get_requires_for_build_editable"]() == wanted


# ---- What a step of make says --------------------------------------------------------------------


def run_step(*command: str, every: str = "5.0") -> subprocess.CompletedProcess[str]:
    code = f"""
import runpy, sys
step = runpy.run_path({str(ROOT / "tools" / "step.py")!r})
step["run"].__globals__["EVERY"] = {every}
sys.exit(step["run"]("kernels", *sys.argv[1:])[0])
"""
    return subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, env=CLEAN
    )


def test_a_step_says_how_far_it_is() -> None:
    script = "echo '[1/3] c++ a.cpp'; echo '[1/1] c++ b.cpp'; echo '[2/3] c++ c.cpp'; sleep 1"
    done = run_step("sh", "-c", script, every="0.3")
    assert done.returncode == 0
    assert "s, 3 of 4 files compiled\n" in done.stdout
    assert done.stdout.endswith("s, done\n")
    assert "c++" not in done.stdout + done.stderr


def test_a_step_that_fails_shows_what_it_printed() -> None:
    done = run_step("sh", "-c", "echo fastvae: without nvcc; echo error: no >&2; exit 3")
    assert done.returncode == 3
    assert "fastvae: without nvcc\n" in done.stdout
    assert done.stderr.endswith("error: no\n")
    assert "failed with status 3" in done.stdout
