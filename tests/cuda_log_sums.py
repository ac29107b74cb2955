"""What the CUDA loops cost that end in the logarithm of a sum (csrc/cuda/log_sums.cu)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from cuda_binary import ARCH, BLOCK_THREADS, MANGLED_TYPES, REGISTERS, TYPES, find_tool


class LogSumKernel(NamedTuple):
    """One of them, for one type."""

    name: str
    dtype: str
    registers: int
    shared_bytes: int
    local_bytes: int

    @property
    def warps(self) -> int:
        """Of a multiprocessor, at once."""
        a_block = BLOCK_THREADS // 32 * -(-self.registers * 32 // 256) * 256
        return min(8, REGISTERS // a_block) * BLOCK_THREADS // 32


LOG_SUMS = (
    *("pack_sides", "pair_values", "pair_gradients"),
    *("pack_marginals", "marginal_values", "marginal_gradients", "add_dimensions", "item_rows"),
    *("colour_pixels", "add_chunks", "straight_through_gradients"),
    *("straight_through", "categorical_kl"),
)
MANGLED_LOG_SUM = re.compile(
    rf"fastvae\d+(?P<name>{'|'.join(LOG_SUMS)})I(?P<type>f|d|13__nv_bfloat16|6__half)"
    r"(?:Lb(?P<each>\d)E?)?(?:Li(?P<number>\d)E?)?E"
)


def log_sum_kernels(binary: Path) -> list[LogSumKernel]:
    cuobjdump = find_tool("cuobjdump")
    assert cuobjdump
    usage = subprocess.run(
        [cuobjdump, "-res-usage", "-arch", ARCH, str(binary.resolve())],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = []
    for mangled, needs in re.findall(r"Function (\S+):\n\s+(.*)", usage):
        if not (match := MANGLED_LOG_SUM.search(mangled)):
            continue
        flags = {"1": ", each", "0": ", mixture"}
        if match["name"] == "categorical_kl":
            flags = {"1": ", mixed", "0": ""}
        of = flags.get(match["each"], "")
        words = {"colour_pixels": "channels", "categorical_kl": "classes kept"}
        if match["number"] and match["number"] != "0":
            of += f", {match['number']} {words.get(match['name'], 'at once')}"
        found.append(
            LogSumKernel(
                match["name"] + of,
                TYPES[MANGLED_TYPES[match["type"]]],
                int(re.search(r"REG:(\d+)", needs)[1]),
                int(re.search(r"SHARED:(\d+)", needs)[1]),
                sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", needs)),
            )
        )
    return sorted(found)


def log_sum_markdown(found: list[LogSumKernel]) -> str:
    lines = ["| kernel | type | registers | warps | shared memory |", "|---|---|---|---|---|"]
    lines += [
        f"| {k.name} | {k.dtype} | {k.registers} | {k.warps} | {k.shared_bytes} B |" for k in found
    ]
    return "\n".join(lines)
