"""What a sweep of `python -m fastvae train` compares: one table and one figure of several runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import write_csv, write_json
from . import figures
from .trainer import Trainer

__all__ = ["COLUMNS", "compare"]

TABLE, FIGURE, SPREAD = "sweep.csv", "sweep.png", "spread.json"

# Of each run's report, all on the held-out data.
COLUMNS = (
    "rate",
    "distortion",
    "elbo",
    "log_likelihood",
    "log_likelihood_standard_error",
    "effective_sample_size",
    "bits_per_dim",
    "mutual_information",
    "marginal_kl",
    "active_units",
)
_LABELS = {"beta": "β", "sigma": "σ", "samples": "K", "seed": "seed"}
_EXAMPLES = 10

Runs = Mapping[Any, tuple[Trainer, dict[str, Any]]]


def compare(folder: Path, name: str, runs: Runs) -> None:
    """Write sweep.csv and sweep.png, and say what they hold; of seeds, also their mean and spread
    in spread.json.

    Args:
        folder: where.
        name: of the setting that differs.
        runs: by its value, the trainers and their reports.
    """
    rows = [{name: value, **_row(report)} for value, (_, report) in runs.items()]
    write_csv(folder / TABLE, (name, *COLUMNS), rows)
    _draw(folder / FIGURE, name, runs)
    print(
        f"\n{name:>10}" + "".join(f"{column:>16}" for column in COLUMNS[:4]) + "  (held-out nats)"
    )
    for row in rows:
        print(f"{row[name]:>10}" + "".join(f"{row[column]:16.3f}" for column in COLUMNS[:4]))
    if name == "seed" and len(rows) > 1:
        spread = {column: _spread([row[column] for row in rows]) for column in COLUMNS}
        write_json(folder / SPREAD, spread)
        for key, of in (("mean", "mean"), ("standard_deviation", "± s.d.")):
            print(f"{of:>10}" + "".join(f"{spread[column][key]:16.3f}" for column in COLUMNS[:4]))
    print(f"\ncomparison  {folder / FIGURE}\ntable       {folder / TABLE}")


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation of several runs."""
    return {"mean": statistics.fmean(values), "standard_deviation": statistics.stdev(values)}


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    return {column: report[column] for column in COLUMNS}


def _draw(path: Path, name: str, runs: Runs) -> None:
    figure = Figure(figsize=(13, 10), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(4, 5))
    labels = [f"{_LABELS[name]} = {value}" for value in runs]
    reports = [report for _, report in runs.values()]
    trainers = [trainer for trainer, _ in runs.values()]
    _draw_plane(axes[0, 0], labels, reports, curve=name == "beta")
    _draw_values(axes[0, 1], _LABELS[name], [str(value) for value in runs], reports)
    _draw_curves(axes[1, 0], labels, trainers)
    x = trainers[0].heldout[:_EXAMPLES]
    models = [trainer.model for trainer in trainers]
    rows = [x, *(model.reconstruct(x).detach() for model in models)]
    rows += [model.sample(_EXAMPLES, seed=trainers[0].settings.seed) for model in models]
    # Of several seeds, each holds out other examples.
    held_out = f"originals held out by {labels[0]}" if name == "seed" else "held-out originals"
    axes[1, 1].set_title(f"{held_out}, reconstructions; samples from the prior")
    names = ["originals", *labels, *(f"sample, {label}" for label in labels)]
    figures.draw_images(axes[1, 1], rows, x.min().item(), x.max().item(), names)
    figures.save(path, figure)


def _draw_plane(
    axes: Axes, labels: list[str], reports: list[dict[str, Any]], *, curve: bool
) -> None:
    """Distortion over rate, with lines of equal ELBO."""
    rates = [report["rate"] for report in reports]
    distortions = [report["distortion"] for report in reports]
    if curve:
        axes.plot(rates, distortions, "C7-", alpha=0.4)
    for i, label in enumerate(labels):
        axes.plot(rates[i], distortions[i], f"C{i}o", label=label)
    axes.margins(0.15)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    locator = MaxNLocator(8)
    for total in locator.tick_values(left + bottom, right + top):
        axes.axline((left, total - left), slope=-1, color="k", alpha=0.12, linewidth=0.8)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_title("rate–distortion plane; on a grey diagonal the ELBO is the same")
    axes.set_xlabel("rate, nats per held-out example")
    axes.set_ylabel("distortion, nats")
    axes.legend()


def _draw_values(axes: Axes, name: str, values: list[str], reports: list[dict[str, Any]]) -> None:
    """ELBO and ln p(x) of each run."""
    axes.plot(values, [report["elbo"] for report in reports], "C0o--", label="ELBO")
    axes.errorbar(
        values,
        [report["log_likelihood"] for report in reports],
        [2 * report["log_likelihood_standard_error"] for report in reports],
        fmt="C1s-",
        capsize=4,
        label=f"ln p(x), {reports[0]['log_likelihood_samples']} importance samples, ± 2 s.e.",
    )
    axes.set_title("held-out ELBO and ln p(x)")
    axes.set_xlabel(name)
    axes.set_ylabel("nats per example")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_curves(axes: Axes, labels: list[str], trainers: list[Trainer]) -> None:
    curves = [[row["heldout_elbo"] for row in trainer.history] for trainer in trainers]
    for label, curve in zip(labels, curves, strict=True):
        axes.plot(range(1, len(curve) + 1), curve, label=label)
    # The first epochs would hide the rest.
    late = [value for curve in curves for value in curve[len(curve) // 10 :]]
    best, worst = max(late), min(late)
    margin = 0.05 * (best - worst) or 1
    axes.set_ylim(worst - margin, best + margin)
    axes.set_title("held-out ELBO")
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per example")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend()
