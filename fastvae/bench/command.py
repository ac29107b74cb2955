"""`python -m fastvae bench`: which cases, which peers, how long, and where the results go."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastvae.files import write_text

from . import machine, peers, report
from .cases import DIRECTIONS, DTYPES, OPS, TARGETS, Case, Op, fits
from .measure import Effort, Measurement, measure
from .shapes import IDIOM_SHAPES, SHAPES, Shape

__all__ = ["add_arguments", "main", "select"]

OUTPUT = Path("fastvae-bench.json")
QUICK = Effort(rounds=5, seconds=1, lap=0.002, patience=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m fastvae bench`."""
    add_selection(parser.add_argument)
    parser.add_argument("--rounds", type=int, default=Effort.rounds, help="turns of each program")
    parser.add_argument(
        "--seconds", type=float, default=Effort.seconds, help="that one case may be timed for"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=Effort.patience,
        help="seconds in which a case is timed again if other processes disturbed it",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few short rounds, and no compilers: a first look"
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="no fresh pages for large outputs: glibc's malloc keeps what is freed",
    )
    parser.add_argument(
        "--between",
        action="store_true",
        help="time each call after a pass of a small network, which leaves the caches as in "
        "training",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="inputs that are in cache where they fit; else as many as do not",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"JSON file, or a folder for one named after the machine (default: a new {OUTPUT})",
    )
    parser.add_argument("--figure", type=Path, help="draw the shares of the limit, as PNG or PDF")
    parser.add_argument("--markdown", type=Path, help="write the table in Markdown, too")
    parser.set_defaults(error=parser.error)


def add_selection(add: Callable[..., Any]) -> None:
    """Declare the options that `select` reads, by argparse's or pytest's function for it."""
    add(
        "--ops",
        nargs="+",
        metavar="OP",
        help=f"functions, or one way to call them, of {', '.join(OPS)} (default: all)",
    )
    add(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"all, sizes as in 128x20, or some of {', '.join(SHAPES)} (default: a small and a "
        "large one)",
    )
    add("--dtypes", nargs="+", metavar="DTYPE", help=f"all, or some of {', '.join(DTYPES)}")
    add(
        "--directions",
        nargs="+",
        metavar="DIRECTION",
        help=f"all, or some of {', '.join(DIRECTIONS)}",
    )
    add("--threads", nargs="+", type=int, metavar="N", help="of the CPU (default: PyTorch's)")
    add("--peers", nargs="*", metavar="PEER", help=f"some of {', '.join(peers.PEERS)}, or none")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--targets", action="store_true", help="only the cases whose ratios fastvae promises")
    add(
        "--idioms",
        action="store_true",
        help="the ops beside the fastest that PyTorch has to be written in their place, on six "
        "shapes",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m fastvae bench` and return the exit status.

    0; 1 if fastvae's own result was wrong; 130 if interrupted. What was measured before is kept.
    """
    error: Callable[[str], NoReturn] = arguments.error
    if arguments.figure and importlib.util.find_spec("matplotlib") is None:
        error("argument --figure: needs matplotlib; want pip install 'fastvae-kernels[bench]'")
    if arguments.rounds < 2:
        error(f"argument --rounds: is {arguments.rounds}; want at least 2, for quartiles")
    try:
        cases = select(arguments)
        wanted = select_peers(arguments)
    except ValueError as problem:
        error(str(problem))
    effort = _effort(arguments)
    description = machine.describe(arguments.device)
    output = arguments.output or _new_path(OUTPUT)
    if effort.keep_memory:
        try:
            machine.keep_memory()
        except OSError as problem:
            error(f"argument --keep-memory: {problem}")
    if output.is_dir():
        output /= f"{machine.name(description)}.json"
    found: list[Measurement] = []
    try:
        for case in cases:
            found.append(_measure(case, wanted, effort, found))
            report.save(output, report.document(description, effort, found))
    except KeyboardInterrupt:
        print(f"\ninterrupted; {output} holds what was measured", file=sys.stderr)
        return 130
    print(f"\nresults  {output}")
    for m in found:
        for name, reason in m.refused.items():
            print(f"not timed: {m.case}, {name}: {reason}", file=sys.stderr)
    if arguments.markdown:
        idioms = arguments.idioms and not arguments.peers
        table = report.idioms_markdown(found) if idioms else report.markdown(found, wanted)
        write_text(arguments.markdown, table)
        print(f"table    {arguments.markdown}")
    if arguments.figure:
        from . import figure  # only here: it needs matplotlib

        figure.draw(arguments.figure, report.document(description, effort, found))
        print(f"figure   {arguments.figure}")
    return 1 if any(peers.FUSED in m.refused for m in found) else 0


def _measure(
    case: Case, wanted: Sequence[str], effort: Effort, before: Sequence[Measurement]
) -> Measurement:
    """Measure one case and print its line."""
    last = before[-1].case if before else None
    if last is None or (last.op, last.direction) != (case.op, case.direction):
        print(report.heading(case, wanted))
    found = measure(case, wanted, effort, _progress)
    _progress("")
    print(report.line(found, wanted), flush=True)
    return found


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _new_path(path: Path) -> Path:
    """`path`, or the first of its numbered kin that is free: results are not written over."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


# ---- From arguments to what they mean ------------------------------------------------------------


def _effort(arguments: argparse.Namespace) -> Effort:
    if arguments.quick:
        kept = ("warm", "keep_memory", "between")
        return dataclasses.replace(QUICK, **{name: getattr(arguments, name) for name in kept})
    names = [field.name for field in dataclasses.fields(Effort) if hasattr(arguments, field.name)]
    return Effort(**{name: getattr(arguments, name) for name in names})


def select(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the options name.

    Raises:
        ValueError: with the option's name, what was given and what is wanted.
    """
    directions = _some("--directions", arguments.directions, DIRECTIONS, ("forward+backward",))
    dtypes = _some("--dtypes", arguments.dtypes, DTYPES, ("float32",))
    threads = arguments.threads or [torch.get_num_threads()]
    if min(threads) < 1:
        raise ValueError(f"argument --threads: is {min(threads)}; want at least 1")
    if arguments.targets:
        shapes_of = {OPS[name]: [SHAPES[s] for n, s in TARGETS if n == name] for name, _ in TARGETS}
    elif arguments.idioms:
        given = arguments.shapes or list(IDIOM_SHAPES)
        ops = [op for op in _ops(arguments.ops) if op.name in peers.IDIOMS and not op.compares]
        shapes_of = {op: _shapes(given, op) for op in ops}
    else:
        shapes_of = {op: _shapes(arguments.shapes, op) for op in _ops(arguments.ops)}
    cases = [
        Case(op, shape, DTYPES[dtype], direction, count, arguments.device)
        for op, shapes in shapes_of.items()
        for direction, shape, dtype, count in itertools.product(directions, shapes, dtypes, threads)
        if direction in op.directions and not peers.unavailable(peers.FUSED, Case(op, shape))
    ]
    if not cases:
        raise ValueError("nothing is left to time of these --ops, --shapes and --directions")
    return cases


def select_peers(arguments: argparse.Namespace) -> list[str]:
    """The peers that the options name, as `select` does."""
    default: tuple[str, ...] = peers.PEERS
    if getattr(arguments, "quick", False):
        default = ("eager", "distributions", peers.IDIOM, peers.FLOOR)
    if arguments.idioms:
        default = (peers.IDIOM, peers.FLOOR)
    wanted = default if arguments.peers is None else arguments.peers
    return list(_some("--peers", list(wanted), peers.PEERS, ()))


def _some(
    option: str,
    given: Sequence[str] | None,
    known: Sequence[str] | dict[str, Any],
    default: Sequence[str],
) -> Sequence[str]:
    if given is None:
        return default
    if list(given) == ["all"]:
        return list(known)
    for name in given:
        if name not in known:
            raise ValueError(
                f"argument {option}: is {name!r}; want all, or some of {', '.join(known)}"
            )
    return given


def _ops(given: Sequence[str] | None) -> list[Op]:
    names = [*OPS, *(op.function for op in OPS.values())]
    wanted = _some("--ops", given, names, list(OPS))
    return [op for op in OPS.values() if op.name in wanted or op.function in wanted]


def _shapes(given: Sequence[str] | None, op: Op) -> list[Shape]:
    names = list(SHAPES) if given == ["all"] else given or op.shapes
    try:
        shapes = [Shape.parse(name) for name in names]
    except ValueError as problem:
        raise ValueError(f"argument --shapes: {problem}") from None
    return [shape for shape in shapes if fits(op, shape)]
