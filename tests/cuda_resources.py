"""What the CUDA kernels cost, read from the binary: registers, memory accesses, instructions.

`python tests/cuda_resources.py` prints a table of all kernels for one architecture and says what is
wrong with them; `--write docs/cuda.md` puts the table of the main ones there. No GPU is needed: the
machine code is taken out of libfastvae.so and disassembled by NVIDIA's tools, from the toolkit or
the pip packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.

The prediction for a kernel is the share of the device's own copy bandwidth that its main loop
reaches if nothing but instructions holds it up: each of the four schedulers of a multiprocessor
issues one instruction a cycle for 32 elements, and integer and comparing instructions take two.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from cuda_binary import (
    ARCH,
    BLOCK_THREADS,
    MANGLED_TYPES,
    REGISTERS,
    SIZES,
    TYPES,
    disassemble,
    find_binary,
)
from cuda_log_sums import log_sum_kernels, log_sum_markdown

# An H200: copy bandwidth as measured with PyTorch's own copy, and clocks under load.
COPY_BYTES_PER_SECOND = 4.3e12
SCHEDULERS = 132 * 4
CLOCK = 1.755e9
SUMS = ("none", "rows", "columns")


class Step(NamedTuple):
    """What a kernel computes; as in csrc/plan.h."""

    inputs: int
    outputs: int
    value: bool
    slow: bool
    huge: bool


def _steps() -> dict[str, Step]:
    """By name, in the order of the kernel tables; none without a binary."""
    try:
        from fastvae import _C
    except ImportError:
        return {}
    return {re.sub(r"fastvae::\w+::", "", name): Step(*what) for name, *what in _C._steps()}


STEPS = _steps()

# Two issue slots each: 64 results a cycle and multiprocessor, where float arithmetic has 128.
HALF_RATE = re.compile(
    r"(IADD3?|VIADD|LOP3|SHF|LEA|ISETP|FSETP|FSEL|SEL|FMNMX|IMNMX|VIMNMX|PRMT|I2FP|PLOP3|IABS)\b"
)
ARITHMETIC = re.compile(r"(FFMA|FMUL|FADD|DFMA|DMUL|DADD)\b")
WIDE_LOAD, WIDE_STORE = re.compile(r"LDG\.E\.128"), re.compile(r"STG\.E\.128")


# ---- Kernels -------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """One kernel: its template arguments, and its instructions in basic blocks."""

    step: str
    dtype: str
    sums: str
    width: int  # elements of an access
    logarithmic: bool
    one_scale: bool  # the scale of a log-probability is one value
    bounded: bool
    registers: int
    local_bytes: int  # a thread's own memory: spilled registers, arrays with a computed index
    instructions: list[str] = field(repr=False)
    labels: dict[str, int] = field(repr=False)

    @property
    def name(self) -> str:
        form = "wide" if self.width > 1 else "single"
        form += ", log" if self.width > 1 and self.logarithmic else ""
        form += ", one scale" if self.one_scale else ""
        form += ", bounded" if self.bounded else ""
        return f"{self.step} {TYPES[self.dtype]}, sums {self.sums}, {form}"

    @property
    def wide(self) -> bool:
        return self.width > 1

    @property
    def blocks(self) -> int:
        """Of a multiprocessor, at once: registers are given to a warp by 256."""
        return min(8, REGISTERS // (BLOCK_THREADS // 32 * -(-self.registers * 32 // 256) * 256))

    @property
    def in_memory(self) -> int:
        """Inputs. Rsample::Backward has no use for mu."""
        return STEPS[self.step].inputs - self.one_scale - (self.step == "Rsample::Backward")

    @property
    def bytes_per_element(self) -> int:
        _, outputs, value, *_ = STEPS[self.step]
        values = max(4, SIZES[self.dtype]) if value and self.sums == "none" else 0
        reduced = 1 if self.sums != "none" and not value else 0  # one operand's gradient is summed
        return (self.in_memory + outputs - reduced) * SIZES[self.dtype] + values

    def problems(self) -> list[str]:
        found = []
        code = "\n".join(self.instructions)
        if self.local_bytes or re.search(r"\b(LDL|STL)\b", code):
            found.append(f"spills registers or has local memory: {self.local_bytes} bytes")
        if self.wide:
            if not self.main_loop:
                found.append("has no loop of 128-bit accesses")
            elif STEPS[self.step].outputs and not any(map(WIDE_STORE.search, self.main_loop)):
                found.append("does not store 128 bits at once")
        return found

    # ---- The main loop ----

    @property
    def accesses(self) -> int:
        """Of a thread in one turn of the main loop: accesses_in_flight() in csrc/cuda/cut.h."""
        step = STEPS[self.step]
        slow = step.slow or self.step.startswith("Rsample")
        return 1 if slow or step.inputs > 3 or SIZES[self.dtype] != 4 else 2

    @property
    def elements(self) -> int:
        return self.accesses * self.width

    @property
    def loads(self) -> int:
        """The fewest wide ones of a turn."""
        return self.elements * SIZES[self.dtype] // 16 * self.in_memory

    @property
    def slots_per_element(self) -> float:
        half_rate = sum(bool(HALF_RATE.match(_opcode(i))) for i in self.main_loop)
        return max(len(self.main_loop), 2 * half_rate) / self.elements

    @property
    def predicted(self) -> float:
        """Share of copy bandwidth."""
        available = SCHEDULERS * 32 * CLOCK * self.bytes_per_element / COPY_BYTES_PER_SECOND
        return min(1.0, available / self.slots_per_element)

    @cached_property
    def main_loop(self) -> list[str]:
        """The instructions of one turn of the loop with 128-bit accesses, on its usual path.

        Of all paths through it the usual one is that with most arithmetic and stores and, of
        these, the shortest: what it leaves out are special cases. Loads beyond one of each input
        are of gradients, which mostly are one number for a row.
        """
        found: list[list[str]] = []
        loops = self._loops()
        for header, body in loops.items():
            inner = set().union(*(b for h, b in loops.items() if h != header and b < body))
            path = self._usual_path(header, body - inner)
            if path and any(map(WIDE_LOAD.search, path)):
                found.append(path)
        return max(found, key=len, default=[])

    def _block(self, start: int) -> list[str]:
        return [i for i in self.instructions[start : self._blocks[start][0]] if i != "NOP"]

    @cached_property
    def _blocks(self) -> dict[int, tuple[int, list[int]]]:
        """From a block's first instruction to its end and the blocks that may follow."""
        jumps = re.compile(r"\b(BRA|EXIT|RET|BRX)\b")
        starts = {0, *self.labels.values()}
        starts |= {n + 1 for n, i in enumerate(self.instructions) if jumps.search(i)}
        order = sorted(s for s in starts if s < len(self.instructions))
        result: dict[int, tuple[int, list[int]]] = {}
        for start, end in zip(order, [*order[1:], len(self.instructions)], strict=True):
            last, after = self.instructions[end - 1], []
            target = re.search(r"BRA\b.*`\((\.L_x_\d+)\)", last)
            if target:
                after.append(self.labels[target[1]])
            conditional = last.startswith("@") or re.search(r"BRA\b.*\bU?P\d", last)
            if end < len(self.instructions) and (not jumps.search(last) or conditional):
                after.append(end)
            result[start] = (end, after)
        return result

    def _loops(self) -> dict[int, set[int]]:
        """From the header of a loop to its blocks."""
        before = defaultdict(set)
        for block, (_, after) in self._blocks.items():
            for b in after:
                before[b].add(block)
        loops: dict[int, set[int]] = {}
        for block, (_, after) in self._blocks.items():
            for header in after:
                if header > block:
                    continue
                body, rest = {header, block}, [block]
                while rest:
                    b = rest.pop()
                    new = before[b] - body if b != header else set()
                    body |= new
                    rest += new
                if 0 not in body:  # else it is not a loop with one way in
                    loops.setdefault(header, set()).update(body)
        return loops

    def _usual_path(self, header: int, body: set[int]) -> list[str]:
        @cache
        def weight(block: int) -> tuple[int, int, int]:
            code = self._block(block)
            stores = sum(bool(WIDE_STORE.search(i)) for i in code)
            return stores, sum(bool(ARITHMETIC.match(_opcode(i))) for i in code), -len(code)

        @cache
        def loads(block: int) -> int:
            return sum(bool(WIDE_LOAD.search(i)) for i in self._block(block))

        # Of each block and number of loads on the way, the best way there.
        best = {(header, loads(header)): (weight(header), [header])}
        for block in sorted(body):  # forward jumps only
            for (at, count), (value, path) in list(best.items()):
                if at != block:
                    continue
                for b in self._blocks[block][1]:
                    if b not in body or b <= block:
                        continue
                    new = tuple(x + y for x, y in zip(value, weight(b), strict=True))
                    key = (b, count + loads(b))
                    if key not in best or new > best[key][0]:
                        best[key] = (new, [*path, b])
        ways = {
            count: way
            for (block, count), way in best.items()
            if header in self._blocks[block][1] and count >= self.loads
        }
        path = ways[min(ways)][1] if ways else []
        return [i for b in path for i in self._block(b)]


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+ ", "", instruction)


MANGLED = re.compile(
    r"generic\d+(?:WithGradientINS\w*_\d+(?P<likelihood>[A-Za-z]+)EE|"
    r"(?P<op>[A-Za-z]+)(?:ILi(?P<n>\d)E)?E?\d+(?P<step>(?:Path)?Backward|Forward|Both))E"
    r"(?P<type>f|d|NS_8HalfBitsE)LNS_4SumsE(?P<sums>\d)"
    r"ELi(?P<width>\d)ELb(?P<log>\d)ELb(?P<scale>\d)ELb(?P<bounded>\d)"
)


def parse(name: str, usage: str, section: str) -> Kernel | None:
    found = MANGLED.search(name)
    if not found:
        return None
    if found["likelihood"]:
        step = f"WithGradient<{found['likelihood']}>"
    else:
        step = found["op"] + (f"<{found['n']}>" if found["n"] else "") + "::" + found["step"]
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return Kernel(
        step,
        MANGLED_TYPES[found["type"]],
        SUMS[int(found["sums"])],
        int(found["width"]),
        found["log"] == "1",
        found["scale"] == "1",
        found["bounded"] == "1",
        int(re.search(r"REG:(\d+)", usage)[1]),
        sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        instructions,
        labels,
    )


def kernels(binary: Path) -> list[Kernel]:
    order = list(STEPS), list(SIZES)
    return sorted(
        (k for parts in disassemble(binary) if (k := parse(*parts))),
        key=lambda k: (order[1].index(k.dtype), order[0].index(k.step), k.name),
    )


# ---- Report --------------------------------------------------------------------------------------


def table(found: list[Kernel]) -> str:
    lines = [
        f"{'kernel':<64} {'registers':>9} {'warps':>5} {'slots':>6} {'bytes':>5} {'of copy':>7}"
    ]
    for k in found:
        line = f"{k.name:<64} {k.registers:>9} {k.blocks * BLOCK_THREADS // 32:>5}"
        if k.wide and k.main_loop:
            line += f" {k.slots_per_element:>6.1f} {k.bytes_per_element:>5} {k.predicted:>7.0%}"
        lines.append(line)
    return "\n".join(lines)


def markdown(found: list[Kernel]) -> str:
    lines = [
        "| kernel | type | sums | registers | warps | slots | bytes | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k in found:
        if not k.wide or not k.logarithmic or k.bounded or k.dtype == "double":
            continue
        step = k.step + (", one scale" if k.one_scale else "")
        lines.append(
            f"| {step} | {TYPES[k.dtype]} | {k.sums} | {k.registers} "
            f"| {k.blocks * BLOCK_THREADS // 32} | {k.slots_per_element:.0f} "
            f"| {k.bytes_per_element} | {k.predicted:.0%} |"
        )
    return "\n".join(lines)


def write(file: Path, reports: dict[str, str]) -> None:
    """Puts each between the marks of its name."""
    text = file.read_text(encoding="utf-8")
    for name, report in reports.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{report}\n{end}{rest.split(end)[1]}"
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=Path, help="default: libfastvae.so of this checkout")
    parser.add_argument("--write", type=Path, help="a document with the report's markers")
    arguments = parser.parse_args()
    binary = arguments.binary or find_binary()
    found, log_sums = kernels(binary), log_sum_kernels(binary)
    print(table(found))
    for k in log_sums:
        print(f"{k.name + ' ' + k.dtype:<64} {k.registers:>9} {k.warps:>5}")
    bad = {k.name: problems for k in found if (problems := k.problems())}
    bad |= {k.name: [f"spills registers: {k.local_bytes} bytes"] for k in log_sums if k.local_bytes}
    for name, problems in bad.items():
        print(f"{name}: {'; '.join(problems)}")
    print(f"{len(found) + len(log_sums)} kernels for {ARCH}, {len(bad)} with problems")
    if arguments.write:
        reports = {"cuda-report": markdown(found), "log-sums": log_sum_markdown(log_sums)}
        write(arguments.write, reports)
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main())
