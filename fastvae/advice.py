"""What keeps the kernels from running where they could, and what mends it: see `fastvae.info`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cuda_toolkit

__all__ = ["advice", "newer_source", "shadowed_package", "version"]

_DISTRIBUTION = "fastvae-kernels"
_REBUILD = "rebuild in the source folder: pip install -v --no-build-isolation ."
_HERE = Path(__file__).parent


def version() -> str:
    """Of the installed distribution."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def advice(
    build: dict[str, Any] | None,
    devices: Sequence[dict[str, str]],
    *,
    problem: str = "",
    has_cpu: bool = True,
    has_nodes: bool = True,
    lacking: Sequence[str] = (),
    here: Path = _HERE,
) -> list[str]:
    """One line for each thing to do.

    Args:
        build: what the binary says of itself, if it loaded.
        devices: the CUDA devices, each with its `name` and `capability`.
        problem: why it did not load.
        has_cpu: whether there are kernels for this processor.
        has_nodes: whether there are autograd's nodes in C++ for the torch that runs.
        lacking: the ops that the binary does not have.
        here: the folder of the package that was imported.
    """
    found = []
    installed = shadowed_package(here)
    if installed is not None:
        found.append(
            f"{here} shadows the installed package, {installed}: run from another folder, or build "
            "here: python setup.py build_ext --inplace"
        )
        if build is None:
            return found
    if build is None:
        if "does not load" in problem:
            return [*found, f"the binary fits another torch or Python; {_REBUILD}"]
        if "never compiled" in problem:
            return [*found, f"compile it; {_REBUILD}"]
        needed = "install a C++20 compiler and Python's headers (g++, python3-dev)"
        return [*found, f"{needed}, then {_REBUILD}"]
    if (source := newer_source(here)) is not None:
        found.append(f"the binary is older than its sources, such as {source}; {_REBUILD}")
    elif lacking:
        found.append(f"the binary is another version's; {_REBUILD}")
    if lacking:
        found.append(f"until then the eager path computes {', '.join(lacking)}")
    if not has_cpu:
        found.append("CPU tensors take the eager path; the kernels want a CPU with AVX2")
    if not has_nodes:
        found.append(f"calls cost less with autograd's nodes for this torch; {_REBUILD}")
    if devices and build["cuda_archs"] is None:
        install = "" if cuda_toolkit.find_nvcc() else f"get nvcc: {cuda_toolkit.INSTALL}; then "
        return [*found, f"CUDA tensors take the eager path; {install}{_REBUILD}"]
    return found + [
        f"the binary has no code for {device['name']}; set TORCH_CUDA_ARCH_LIST="
        f"{device['capability']}, then {_REBUILD}"
        for device in devices
        if not _runs_on(device["capability"], build["cuda_archs"])
    ]


def shadowed_package(here: Path = _HERE) -> Path | None:
    """The folder of the installed package, with a binary, if another one was imported."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file("fastvae"))).resolve()
    return folder if folder != here.resolve() and any(folder.glob("_C.*")) else None


def newer_source(here: Path = _HERE) -> str | None:
    """A source that was changed after the binary beside it was built, in a source folder."""
    binaries = [path.stat().st_mtime for path in here.glob("_C.*")]
    root = here.parent / "csrc"
    sources = [path for path in root.rglob("*.*") if path.is_file()]
    if not binaries or not sources:
        return None
    last = max(sources, key=lambda path: path.stat().st_mtime)
    changed = last.stat().st_mtime > max(binaries)
    return str(last.relative_to(here.parent)) if changed else None


def _runs_on(capability: str, archs: list[str]) -> bool:
    """Whether a binary for `archs` has code for a GPU: its major version's, or older PTX."""
    major, minor = map(int, capability.split("."))
    for arch in archs:
        number, _, ptx = arch.partition("+")
        arch_major, arch_minor = (int(digits.rstrip("af")) for digits in number.split("."))
        if (arch_major == major and arch_minor <= minor) or (
            ptx and (arch_major, arch_minor) <= (major, minor)
        ):
            return True
    return False
