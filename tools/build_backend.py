"""setuptools as build backend, which where there is a GPU and no nvcc asks for nvcc too.

In an environment of pip's own these packages, 100 MB, are there for the build only. Without build
isolation pip asks nobody, and setup.py prints the command that brings them.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What pyproject.toml does not know of."""
    root = Path(__file__).parents[1]
    toolkit = runpy.run_path(str(root / "fastvae" / "cuda_toolkit.py"))
    wish = os.environ.get("FASTVAE_CUDA") or "unset"
    wanted = wish == "1" or (wish == "unset" and toolkit["has_driver"]())
    if sys.platform != "linux" or not wanted or toolkit["find_nvcc"]():
        return []
    return [*toolkit["REQUIREMENTS"]]


get_requires_for_build_editable = get_requires_for_build_wheel
