"""What was measured, as a table that grows line by line and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvae.files import write_json

from .cases import TARGETS, Case
from .measure import Effort, Measurement
from .peers import FLOOR, FUSED, IDIOM, IDIOMS, LIMIT, TITLES

__all__ = ["FORMAT", "document", "heading", "idioms_markdown", "line", "markdown", "save"]

FORMAT = "fastvae bench, 1"


# ---- JSON ----------------------------------------------------------------------------------------


def document(
    machine: Mapping[str, Any], effort: Effort, measurements: Sequence[Measurement]
) -> dict[str, Any]:
    """All of a run; JSON-serializable."""
    return {
        "format": FORMAT,
        "machine": dict(machine),
        "effort": dataclasses.asdict(effort),
        "cases": [_entry(m) for m in measurements],
    }


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _entry(found: Measurement) -> dict[str, Any]:
    case = found.case
    return {
        "op": case.op.name,
        "shape": case.shape.name,
        "text": case.shape.text,
        "dtype": case.dtype_name,
        "direction": case.direction,
        "threads": case.threads,
        "device": case.device,
        "elements": case.elements,
        "bytes": case.bytes,
        "traffic": [str(t) for t in case.passes],
        "in_cache": found.in_cache,
        "disturbance": found.disturbance,
        "programs": {name: _program(found, name) for name in found.seconds},
        "refused": found.refused,
    }


def _program(found: Measurement, name: str) -> dict[str, Any]:
    seconds = found.time(name)
    entry = {
        "seconds": dataclasses.asdict(seconds),
        "rounds": len(found.seconds[name]),
        "ns_per_element": 1e9 * seconds.median / found.case.elements,
        "gb_per_s": found.case.bytes / seconds.median / 1e9,
        "share_of_limit": dataclasses.asdict(found.ratio(LIMIT, name)),
        "saved_bytes": found.saved.get(name),
    }
    if FUSED in found.seconds:
        entry["times_fastvae"] = dataclasses.asdict(found.ratio(name, FUSED))
    return entry


# ---- Table ---------------------------------------------------------------------------------------

_COLUMNS = (
    ("shape", 22),
    ("dtype", 9),
    ("threads", 8),
    ("µs", 10),
    ("ns/element", 11),
    ("GB/s", 7),
    ("of limit", 9),
    ("saved, B", 9),
)
_PEER_WIDTH = 25


def heading(case: Case, programs: Sequence[str]) -> str:
    """What stands above the lines of one op and direction."""
    what = f"{case.op.name}, {case.direction}: {' | '.join(filter(None, map(str, case.passes)))}"
    columns = _cells([name for name, _ in _COLUMNS])
    peers = "".join(f"{name:>{_PEER_WIDTH}}" for name in programs)
    return f"\n{what}\n{columns}{peers}"


def line(found: Measurement, programs: Sequence[str]) -> str:
    """A case: fastvae's own figures, then how many times its time each peer takes (quartiles).

    Where a ratio is promised and not reached, the promise stands behind it.
    """
    case = found.case
    cells = [case.shape.name, case.dtype_name, str(case.threads)]
    if FUSED in found.seconds:
        entry = _program(found, FUSED)
        cells += [
            f"{1e6 * entry['seconds']['median']:.1f}",
            f"{entry['ns_per_element']:.2f}",
            f"{entry['gb_per_s']:.1f}",
            f"{entry['share_of_limit']['median']:.0%}",
            str(entry["saved_bytes"]),
        ]
    else:
        cells += ["refused", "", "", "", ""]
    text = _cells(cells) + "".join(f"{_ratio(found, name):>{_PEER_WIDTH}}" for name in programs)
    if found.disturbed:
        text += f"  disturbed: others used {found.disturbance:.1f} cores"
    return text


def _cells(texts: Sequence[str]) -> str:
    """Words to the left of their columns, numbers to the right."""
    return "".join(
        f"{text:<{width}}" if name in ("shape", "dtype") else f"{text:>{width}}"
        for text, (name, width) in zip(texts, _COLUMNS, strict=True)
    )


def markdown(measurements: Sequence[Measurement], programs: Sequence[str]) -> str:
    """The same as a table for a README, without a type and a number of threads that all share."""
    named = ["direction", *_differing(measurements)]
    heads = ["op", "shape", *(_HEADS.get(name, name) for name in named), "µs", "of limit"]
    heads += [*(TITLES.get(name, name) for name in programs), "saved, B: fastvae", "eager"]
    lines = [heads, ["---"] * len(heads)]
    for found in measurements:
        if FUSED not in found.seconds:
            continue
        case, entry = found.case, _program(found, FUSED)
        cells = [f"`{case.op.name}`", case.shape.name.replace("x", "×")]
        cells += [str(getattr(case, name)) for name in named]
        cells.append(f"{1e6 * entry['seconds']['median']:.0f}")
        cells.append(f"{entry['share_of_limit']['median']:.0%}")
        cells += [_ratio(found, name).partition(" <")[0] for name in programs]
        cells.append(str(found.saved[FUSED]))
        cells.append(
            f"{found.saved['eager'] / case.elements:.0f} an element"
            if "eager" in found.saved
            else "–"
        )
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


_HEADS = {"dtype_name": "dtype"}


def _differing(measurements: Sequence[Measurement]) -> list[str]:
    """The settings that tell cases of one op, shape and direction apart."""
    settings = ("dtype_name", "threads")
    return [name for name in settings if len({getattr(m.case, name) for m in measurements}) > 1]


def idioms_markdown(measurements: Sequence[Measurement]) -> str:
    """How many times fastvae's time the strongest idiom takes, and two ATen ops, shape by shape."""
    shapes = list(dict.fromkeys(found.case.shape.name for found in measurements))
    heads = ["op", "in its place", "direction", "threads"]
    heads += [name.replace("x", "×") for name in shapes]
    lines = [heads, ["---"] * len(heads)]
    cells: dict[tuple[str, str, str, int], dict[str, str]] = {}
    for found in measurements:
        case = found.case
        for peer in (IDIOM, FLOOR):
            if peer in found.seconds and FUSED in found.seconds:
                key = case.op.name, peer, case.direction, case.threads
                row = cells.setdefault(key, {})
                row[case.shape.name] = f"{found.ratio(peer, FUSED).median:.2f}"
    for (op, peer, direction, threads), row in cells.items():
        name = f"`{IDIOMS[op][0]}`" if peer == IDIOM else "a graph of two ATen ops"
        row_of = [f"`{op}`", name, direction, str(threads)]
        lines.append([*row_of, *(row.get(s, "–") for s in shapes)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ratio(found: Measurement, name: str) -> str:
    if name not in found.seconds or FUSED not in found.seconds:
        return "–"
    ratio = found.ratio(name, FUSED)
    text = f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
    goal = _goal(found.case, name)
    return f"{text} <{goal:g}" if goal is not None and ratio.median < goal else text


def _goal(case: Case, peer: str) -> float | None:
    """The ratio that is promised for a case, if one is."""
    settings = case.dtype_name, case.direction, case.threads, case.device
    if settings != ("float32", "forward+backward", 2, "cpu"):
        return None
    return TARGETS.get((case.op.name, case.shape.name), {}).get(peer)
