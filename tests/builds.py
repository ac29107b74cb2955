"""Builds of fastvae that setup.py does not make: other loops for CPU tensors, and sanitizers.

`python builds.py NAME` compiles what changed and prints the folder of the package: put it into
PYTHONPATH. The names:

- cuda: the CUDA loops, compiled for the CPU (cuda_on_host), compute on CPU tensors
- cuda_asan: the same under AddressSanitizer and UndefinedBehaviorSanitizer
- cpu_asan: the CPU loops under these two
- portable_asan: the CPU loop as it is where there is no instruction set of its own for it
- cpu_tsan: the CPU loops under ThreadSanitizer, on std::thread (std_threads)
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pybind11
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "tests"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CXX = os.environ.get("CXX") or "c++"

FLAGS = (
    "-std=c++20 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
)
SANITIZERS = {
    "": "",
    "asan": "-fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all",
    "tsan": "-fno-omit-frame-pointer -fsanitize=thread",
}
# Nothing need be inlined, else each vector's check is compiled into every kernel, for minutes.
NOT_INLINED = "-Dalways_inline=unused"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512dq -mavx512bw -mavx512vl"
PARTS = ("", "_log_sums")
INSTRUCTIONS = {
    f"{name}{part}.cpp": flags
    for name, flags in (("avx2", AVX2), ("avx512", AVX512))
    for part in PARTS
}
# The C++ library too, so that the sanitizer finds its throw() before it starts to watch.
RUNTIMES = {"asan": ("libasan.so", "libstdc++.so"), "tsan": ("libtsan.so", "libstdc++.so")}
OPTIONS = {
    "asan": {"ASAN_OPTIONS": "detect_leaks=0"},  # Python itself leaks
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"},
}

CALLS = (
    *(f"csrc/ops/{path.name}" for path in sorted(ROOT.glob("csrc/ops/*.cpp"))),
    "csrc/cpu/dispatch.cpp",
)
PORTABLE = tuple(f"csrc/cpu/baseline{part}.cpp" for part in PARTS)
CPU = (*(f"csrc/cpu/{name}" for name in INSTRUCTIONS),) if X86 else PORTABLE
CUDA = (*(f"csrc/cuda/{path.name}" for path in sorted(ROOT.glob("csrc/cuda/*.cu"))),)
NO_CPU = "tests/cuda_on_host/no_cpu.cpp"
PROGRAMS = ("barriers", "cuts", "far")

NINJA = f"""
ninja_required_version = 1.5
rule compile
  description = $out
  command = {CXX} {FLAGS} $flags -MD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  description = $out
  command = {CXX} $flags $in -o $out $libraries
"""


def build(name: str) -> Path:
    """The folder of the package, a symlink for each of its parts beside the other binary."""
    package = BUILD / name / "fastvae"
    package.mkdir(parents=True, exist_ok=True)
    for part in (ROOT / "fastvae").iterdir():
        if part.suffix not in ("", ".py"):
            continue  # the binaries
        link = package / part.name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(part)
    (BUILD / "build.ninja").write_text(_ninja())
    path = os.environ["PATH"] + os.pathsep + sysconfig.get_path("scripts")  # where pip puts ninja
    done = subprocess.run(
        ["ninja", "-C", BUILD, name],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"ninja -C {BUILD} {name}:\n{done.stdout}{done.stderr}")
    return package.parent


def _ninja() -> str:
    """How all of them are built, each object once."""
    lines = {NINJA: None}  # in order

    def compiled(source: str, device: str, sanitizer: str) -> str:
        target = f"objects/{device}{sanitizer and '_'}{sanitizer}/{source}.o"
        flags = [SANITIZERS[sanitizer], INSTRUCTIONS.get(Path(source).name, "")]
        if X86 and device == "cuda":
            flags += ["-mfma"]  # else each is a call
        # The fibers of the CUDA loops switch so often that it pays to compile them well; but -O2
        # takes three times as long as -O1, and gains less than that in all tests.
        flags += ["-O1"] if not sanitizer else [NOT_INLINED, "-O1" if device == "cuda" else "-O0"]
        if sanitizer == "tsan" and source.endswith("cpu/dispatch.cpp"):
            flags += [f"-I{HERE}/std_threads"]
        lines[f"build {target}: compile {ROOT / source}\n  flags = {_common(device, flags)}"] = None
        return target

    def linked(target: str, objects: Sequence[str], flags: str, libraries: str = "") -> str:
        line = f"build {target}: link {' '.join(objects)}"
        lines[f"{line}\n  flags = {flags}\n  libraries = {libraries}"] = None
        return target

    folders = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    for name in ("cuda", "cuda_asan", "cpu_asan", "cpu_tsan", "portable_asan"):
        device, _, sanitizer = name.partition("_")
        # What lies around the loops is the same on both devices: one of them checks it.
        around = sanitizer if device == "cpu" else ""
        objects = [compiled(source, device, around) for source in CALLS]
        loops = {"cpu": CPU, "portable": PORTABLE, "cuda": (*CUDA, NO_CPU)}[device]
        objects += [compiled(source, device, sanitizer) for source in loops]
        flags = SANITIZERS[sanitizer]
        libraries = " ".join([*folders, "-ltorch_cpu -lc10"])
        module = compiled("csrc/module.cpp", "module", "")
        targets = [
            linked(f"{name}/fastvae/libfastvae.so", objects, f"-shared {flags}", libraries),
            linked(f"{name}/fastvae/_C{SUFFIX}", [module], "-shared"),
        ]
        if device == "cuda":
            cut = compiled("csrc/cuda/cut.cu", device, sanitizer)
            for program in PROGRAMS:
                main = compiled(f"tests/cuda_on_host/{program}.cu", device, sanitizer)
                targets.append(linked(f"{name}/{program}", [main, cut], flags))
        lines[f"build {name}: phony {' '.join(targets)}"] = None
    return "\n".join(lines) + "\n"


def _common(device: str, flags: Sequence[str]) -> str:
    """Flags, with the macros and folders that all files of a device want."""
    macros = [
        "TORCH_TARGET_VERSION=0x020b000000000000",
        f'FASTVAE_TORCH_BUILT="{torch.__version__}"',
    ]
    if device == "cuda":
        macros += ["USE_CUDA", "FASTVAE_CUDA_ON_HOST", 'FASTVAE_CUDA="none, on the host"']
        macros += ['FASTVAE_CUDA_ARCHS=""']
        flags = [
            *flags,
            f"-I{HERE}/cuda_on_host",  # the CUDA headers in it
            "-U_FORTIFY_SOURCE",  # which forbids longjmp() from stack to stack
        ]
    elif X86 and device == "cpu":
        macros += ["FASTVAE_X86"]
    system = [pybind11.get_include(), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    words = [*(f"-D{macro}" for macro in macros), *(f"-isystem{folder}" for folder in system)]
    return " ".join([*flags, *map(shlex.quote, words)])


def environment(folder: Path) -> dict[str, str]:
    """The environment in which Python imports the package of `folder`."""
    sanitizer = folder.name.partition("_")[2]
    extra = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    if sanitizer:
        runtimes = [
            subprocess.run(
                [CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in RUNTIMES[sanitizer]
        ]
        extra |= {"LD_PRELOAD": " ".join(runtimes)} | OPTIONS[sanitizer]
    return os.environ | extra


PYTEST = (
    sys.executable,
    *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-c"),
    ROOT / "pyproject.toml",
)


def run(folder: Path, *command: object, **settings: str) -> str:
    """The output of a command to which `import fastvae` means the package in `folder`."""
    done = subprocess.run(
        [str(word) for word in command],
        # The loops run in one thread, or in threads of their own; PyTorch's would only wait.
        env=environment(folder) | {"OMP_NUM_THREADS": "1"} | settings,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-10000:]}\n{done.stderr[-10000:]}"
    return done.stdout


@contextmanager
def at_once(jobs: dict[str, Callable[[], str]]) -> Iterator[dict[str, Future[str]]]:
    """Runs jobs of one thread each on all cores, in order; leaving, waits for them."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {name: pool.submit(job) for name, job in jobs.items()}


if __name__ == "__main__":
    print(build(sys.argv[1]))
