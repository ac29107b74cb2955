"""The picture of a run: each op's share of the limit, and what a small call costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.ticker import PercentFormatter

from .peers import FLOOR, FUSED, IDIOM, PEERS, TITLES

__all__ = ["draw"]

_COLOURS = {
    FUSED: "C3",
    "compile": "C0",
    "jax": "C2",
    "distributions": "0.75",
    "eager": "0.5",
    IDIOM: "C1",
    FLOOR: "C4",
}
_LARGE = 2**17  # elements from which the limit is memory, not the call

Entry = Mapping[str, Any]


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Draw the large cases of a document as shares of the limit, the small ones as times of a call.

    Args:
        path: of the picture; its suffix says which kind.
        document: as `report.document` gives it.
    """
    entries = [entry for entry in document["cases"] if FUSED in entry["programs"]]
    large = [entry for entry in entries if entry["elements"] >= _LARGE]
    small = [entry for entry in entries if entry["elements"] < _LARGE]
    panels = [(part, kind) for part, kind in ((large, "share"), (small, "time")) if part]
    rows = max((len(part) for part, _ in panels), default=1)
    figure = Figure(figsize=(6.5 * max(len(panels), 1), 1.6 + 0.75 * rows), layout="constrained")
    names = [name for name in (FUSED, *PEERS) if any(name in e["programs"] for e in entries)]
    for axes, (part, kind) in zip(
        figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False
    ):
        _draw_bars(axes, part, names, kind)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(_caption(document["machine"], entries))
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Axes, entries: Sequence[Entry], names: Sequence[str], kind: str) -> None:
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        found = [(i, e["programs"][name]) for i, e in enumerate(entries) if name in e["programs"]]
        spreads = [
            p["share_of_limit"] if kind == "share" else _scaled(p["seconds"], 1e6) for _, p in found
        ]
        values = [s["median"] for s in spreads]
        axes.barh(
            [i + (k - (len(names) - 1) / 2) * height for i, _ in found],
            values,
            height,
            xerr=[
                [s["median"] - s["low"] for s in spreads],
                [s["high"] - s["median"] for s in spreads],
            ],
            error_kw={"elinewidth": 0.8, "alpha": 0.6},
            color=_COLOURS[name],
            label=TITLES.get(name, name),
        )
    axes.set_yticks(range(len(entries)), [_label(entry, entries) for entry in entries])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if kind == "share":
        axes.axvline(1, color="black", linewidth=1, linestyle="--")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title("large: speed, where a copy of the same bytes is 100 %")
    else:
        axes.set_xscale("log")  # calls of one sample and of fifty
        axes.set_xlabel("µs")
        axes.set_title("small: time of a call")


def _scaled(spread: Mapping[str, float], factor: float) -> dict[str, float]:
    return {key: factor * value for key, value in spread.items()}


def _label(entry: Entry, entries: Sequence[Entry]) -> str:
    """The op and whatever else differs between the entries."""
    parts = [f"{entry['op']}\n{entry['shape']}"]
    for key, text in (("dtype", "{}"), ("direction", "{}"), ("threads", "{} threads")):
        if len({e[key] for e in entries}) > 1:
            parts.append(text.format(entry[key]))
    return ", ".join(parts)


def _caption(machine: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    parts = [machine.get("gpu") or f"{machine['cpu']}, {machine['cpu_capability']}"]
    for key, text in (("threads", "{} threads"), ("dtype", "{}"), ("direction", "{}")):
        values = {e[key] for e in entries}
        if len(values) == 1:
            parts.append(text.format(*values))
    return ", ".join(parts) + f"; torch {machine['torch']}"
