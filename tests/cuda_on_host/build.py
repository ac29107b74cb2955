"""Builds a fastvae whose CUDA loops are compiled for the CPU and compute on CPU tensors.

`python build.py` compiles what changed and prints the folder that holds the package: put it into
PYTHONPATH. `--sanitize` builds another, under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CXX = os.environ.get("CXX") or "c++"
SANITIZE = "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
SOURCES = [
    *ROOT.glob("csrc/*.cpp"),
    *ROOT.glob("csrc/cuda/*.cu"),
    ROOT / "csrc/cpu/dispatch.cpp",
    HERE / "no_cpu.cpp",
]
PROGRAMS = ("barriers", "cuts", "far")

NINJA = """
rule compile
  description = $in
  command = {cxx} {flags} -MD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} $flags $in -o $out $libraries
"""


def build(sanitize: bool = False) -> Path:
    """The folder of the package, a symlink for each of its files beside the other binary."""
    folder = ROOT / "build" / ("cuda_on_host_sanitized" if sanitize else "cuda_on_host")
    package = folder / "fastvae"
    package.mkdir(parents=True, exist_ok=True)
    for file in (ROOT / "fastvae").glob("*.py"):
        link = package / file.name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(file)
    (folder / "build.ninja").write_text(_ninja(SANITIZE if sanitize else ""))
    path = os.environ["PATH"] + os.pathsep + sysconfig.get_path("scripts")  # where pip puts ninja
    done = subprocess.run(
        ["ninja", "-C", folder], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"ninja -C {folder}:\n{done.stdout}{done.stderr}")
    return folder


def _ninja(sanitize: str) -> str:
    macros = [
        "USE_CUDA",
        'FASTVAE_CUDA="none, on the host"',
        'FASTVAE_CUDA_ARCHS=""',
        "FASTVAE_CUDA_ON_HOST",
        "TORCH_TARGET_VERSION=0x020b000000000000",
        f'FASTVAE_TORCH_BUILT="{torch.__version__}"',
    ]
    system = [pybind11.get_include(), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = [
        "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno",
        "-U_FORTIFY_SOURCE",  # which forbids longjmp() from stack to stack
        f"-I{HERE}",  # the CUDA headers in it
        *(f"-isystem {folder}" for folder in system),
        *(f"'-D{macro}'" for macro in macros),
        sanitize,
    ]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    libraries += ["-ltorch_cpu", "-lc10"]
    lines = [NINJA.format(cxx=CXX, flags=" ".join(flags))]
    objects = []
    for source in sorted(SOURCES):
        objects.append("_".join(source.relative_to(ROOT).parts) + ".o")
        lines.append(f"build {objects[-1]}: compile {source}")
    for name in PROGRAMS:
        lines.append(f"build {name}.o: compile {HERE / name}.cu")
        lines.append(f"build {name}: link {name}.o csrc_cuda_cut.cu.o\n  flags = {sanitize}")
    binary = f"fastvae/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines.append(f"build {binary}: link {' '.join(objects)}")
    lines.append(f"  flags = -shared {sanitize}\n  libraries = {' '.join(libraries)}\n")
    return "\n".join(lines)


def environment(folder: Path) -> dict[str, str]:
    """The environment in which Python imports the package of `folder`."""
    extra = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    if folder.name.endswith("sanitized"):
        # The C++ library too, so that the sanitizer finds its throw() before it starts to watch.
        runtimes = [
            subprocess.run(
                [CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libstdc++.so")
        ]
        # Python itself leaks.
        extra |= {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    return os.environ | extra


if __name__ == "__main__":
    print(build(sanitize="--sanitize" in sys.argv))
