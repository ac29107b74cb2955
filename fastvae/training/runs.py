"""Folders of runs: their files and names, and which is the latest."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from . import checkpoint, claim
from .data import DIGITS
from .options import SWEEPS

__all__ = [
    "CHECKPOINT",
    "FIGURE",
    "METRICS",
    "REPORT",
    "RUNS",
    "can_resume",
    "latest",
    "name",
    "own",
    "source",
]

RUNS = Path("runs")
CHECKPOINT, METRICS = "checkpoint.pt", "metrics.csv"
FIGURE, REPORT = "figure.png", "report.json"


def source(data: str) -> str:
    """What `--data` names: the digits, or a path that can be found again from elsewhere.

    Raises:
        ValueError: it is both.
    """
    if data != DIGITS:
        return str(Path(data).resolve())
    if Path(DIGITS).exists():
        raise ValueError(
            f"is '{DIGITS}', the bundled data, but there is a ./{DIGITS} too; want ./{DIGITS} for "
            f"it, and nothing for the bundled data"
        )
    return DIGITS


def name(source: str) -> str:
    """Of a run on these data."""
    path = Path(source)
    return (path.name if path.is_dir() else path.stem) or "data"


def latest(source: str | None, swept: str | None) -> Path:
    """The run in `RUNS` that was saved last, of those on these data if they are given; or, where a
    setting is swept, the sweep.

    Raises:
        ValueError: there is none, it is damaged, or the latest is a sweep and a run was wanted.
    """
    saved = [*RUNS.glob(f"*/{CHECKPOINT}"), *RUNS.glob(f"*/*/{CHECKPOINT}")]
    for path in sorted(saved, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        run = path.parent
        setting = run.name.partition("-")[0]
        is_of_sweep = run.parent != RUNS and setting in SWEEPS
        if swept is not None and not (is_of_sweep and setting == swept):
            continue
        if source is not None and checkpoint.load(path)["settings"]["data"] != source:
            continue
        if is_of_sweep and swept is None:
            raise ValueError(
                f"the latest is a run of the sweep {run.parent}; want --sweep-{setting} and its "
                "values too, or --out with the folder of a run"
            )
        return run.parent if is_of_sweep else run
    wanted = f"sweep of {swept}" if swept else "run"
    on = "" if source is None else f" on {source}"
    raise ValueError(f"no {wanted}{on} in {RUNS}; want --out with the folder of a {wanted}")


def can_resume(folder: Path) -> bool:
    """Whether a run, or one of a sweep, was saved there."""
    return any(folder.glob(CHECKPOINT)) or any(folder.glob(f"*/{CHECKPOINT}"))


def own(folder: Path, stack: ExitStack) -> None:
    """Hold the folder of a new run; nothing of an earlier one is written over.

    Raises:
        OSError: it cannot be made.
        ValueError: it is another process's, or it holds a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(claim.held(folder))
    found = [name for name in (CHECKPOINT, METRICS, FIGURE, REPORT) if (folder / name).exists()]
    if found:
        raise ValueError(
            f"is {folder}, where a run left {', '.join(found)}; want --resume too, to go on with "
            "that run, or another folder"
        )
