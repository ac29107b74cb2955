"""The machine that a figure is of: its description, its caches, its threads."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastvae import backend

__all__ = [
    "cache_bytes",
    "caches",
    "describe",
    "keep_memory",
    "name",
    "seconds_of_others",
    "settle_malloc",
    "use_threads",
]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 64 * 2**20  # where the system does not say
_UNITS = {"": 1, "K": 2**10, "M": 2**20}


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let PyTorch and fastvae compute on `count` threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_malloc() -> None:
    """Bring glibc's malloc where any program has it that ever freed a tensor of nearly 32 MiB.

    From then on it keeps freed blocks below that size for the next call, up to 64 MiB of them
    (mallopt(3), M_MMAP_THRESHOLD). Before, it may or may not return outputs of a few MiB to the
    system after every call, by where they happen to lie, and a call that gets them anew waits for
    their pages to be mapped (measured: 0.9 or 1.7 ns an element for one and the same program).
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def keep_memory() -> None:
    """Let glibc's malloc keep what is freed, for the rest of the process.

    By default it returns each block above 32 MiB to the system, and a call that makes such a block
    anew waits for its pages to be mapped, unless a free block of the size lies about by chance.

    Raises:
        OSError: the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise OSError("malloc cannot be told to keep memory; want glibc") from None
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def seconds_of_others() -> float | None:
    """Processor time that all other processes have used since the system started, if it says."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everybody - sum(os.times()[:4])


def caches() -> dict[str, int]:
    """Bytes of each data cache that one core reaches: {"L1": 49152, ...}; empty if unknown."""
    found = {}
    for folder in sorted(_CACHES.glob("index*")):
        level, kind, size = ((folder / f).read_text().strip() for f in ("level", "type", "size"))
        if kind != "Instruction" and (match := re.fullmatch(r"(\d+)([KM]?)", size)):
            found[f"L{level}"] = int(match[1]) * _UNITS[match[2]]
    return found


def cache_bytes(device: str) -> int:
    """Of the last cache before the memory of `device`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return max(caches().values(), default=_UNKNOWN_CACHE)


def describe(device: str = "cpu") -> dict[str, Any]:
    """All that a reader needs to place a figure; JSON-serializable."""
    info = backend.info()
    description = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "fastvae": info["fastvae"],
        "backend": info["backend"],
        "cpu": _cpu_model(),
        "cpu_capability": info["cpu_capability"],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "caches": caches(),
        "memory": _memory(),
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": info["python"],
        "torch": info["torch"],
        "jax": _version("jax"),
        "compiler": (info["build"] or {}).get("compiler"),
        "malloc": {
            name: value
            for name, value in os.environ.items()
            if name == "LD_PRELOAD" or name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
        },
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["gpu"] = properties.name
        description["gpu_cache"] = properties.L2_cache_size
        description["cuda"] = info["torch_cuda"]
    return description


def name(description: dict[str, Any]) -> str:
    """Of a file that holds this machine's figures, such as "amd-epyc-2-cores-avx512"."""
    unit = description.get("gpu") or (
        f"{description['cpu']} {description['cores']} cores {description['cpu_capability']}"
    )
    return re.sub(r"[^a-z0-9]+", "-", unit.lower()).strip("-")


def _cpu_model() -> str:
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the source folder that fastvae runs from, with a "+" if something in it was changed."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(folder), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
