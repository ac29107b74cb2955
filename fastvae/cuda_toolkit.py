"""Where the CUDA compiler is, or how to get it from the package index.

Free of other imports, because the build asks too, before there is a torch: see setup.py and
tools/build_backend.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

__all__ = ["INSTALL", "REQUIREMENTS", "find_nvcc", "has_driver"]

# One version of all; the oldest of CUDA 13, which runs on every driver that CUDA 13 does.
REQUIREMENTS = tuple(
    f"{name}==13.0.*"
    for name in (
        "nvidia-cuda-nvcc",
        "nvidia-cuda-runtime",
        "nvidia-cuda-crt",
        "nvidia-cuda-cccl",
        "nvidia-nvvm",
    )
)
INSTALL = "pip install " + " ".join(f"'{requirement}'" for requirement in REQUIREMENTS)
"""The command that brings nvcc."""


def find_nvcc() -> str | None:
    """nvcc in CUDA_HOME, on PATH, in the usual place, or in a pip package."""
    home = os.environ.get("CUDA_HOME", os.devnull)
    wheels = [str(folder) for entry in sys.path for folder in Path(entry).glob("nvidia/*/bin")]
    places = [f"{home}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin", *wheels]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return bool(shutil.which("nvidia-smi")) or os.path.exists("/proc/driver/nvidia/version")
