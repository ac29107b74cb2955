"""The machine code of the CUDA kernels, as NVIDIA's tools read it from the binary."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCH = "sm_90"
BLOCK_THREADS = 256
REGISTERS = 65536  # of a multiprocessor

SIZES = {"float": 4, "double": 8, "HalfBits": 2}
TYPES = {
    "float": "float32",
    "double": "float64",
    "HalfBits": "half types",
    "__nv_bfloat16": "bfloat16",
    "__half": "float16",
}
MANGLED_TYPES = {
    "f": "float",
    "d": "double",
    "NS_8HalfBitsE": "HalfBits",
    "13__nv_bfloat16": "__nv_bfloat16",
    "6__half": "__half",
}


def find_tool(name: str) -> str | None:
    """From PATH, the toolkit beside nvcc, or a pip package."""
    places = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    places += [str(p) for entry in sys.path for p in Path(entry).glob("nvidia/*/bin")]
    return shutil.which(name, path=os.pathsep.join(places))


def disassemble(binary: Path) -> Iterator[tuple[str, str, str]]:
    """Of each kernel its name, the line on what it needs, and the text of its section."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if not cuobjdump or not nvdisasm:
        raise FileNotFoundError(
            "cuobjdump and nvdisasm are missing: pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm"
        )
    with tempfile.TemporaryDirectory() as folder:
        run = {"cwd": folder, "check": True, "capture_output": True, "text": True}
        subprocess.run([cuobjdump, "-xelf", ARCH, str(binary.resolve())], **run)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            needs = subprocess.run([cuobjdump, "-res-usage", cubin.name], **run).stdout
            usage = dict(re.findall(r"Function (\S+):\n\s+(.*)", needs))
            text = subprocess.run([nvdisasm, "-c", cubin.name], **run).stdout
            for section in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
                name = section.split(",", 1)[0]
                yield name, usage[name], section


def find_binary() -> Path:
    found = ROOT / "fastvae" / "libfastvae.so"
    if not found.is_file():
        raise FileNotFoundError(f"there is no {found}: build it first")
    return found
