"""`python -m fastvae train`: trains a VAE and draws what it learned.

A run is a folder of four files: checkpoint.pt, from which `--resume` goes on bit for bit;
metrics.csv, one row an epoch, in nats per example; and at the end figure.png, and report.json on
the held-out data. A sweep is a folder of runs, with a table and a figure that compare them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from ..backend import use_backend
from ..files import write_csv, write_json
from ..ops import has_kernels
from . import checkpoint, claim, data, parallel
from .options import SWEEPS, add_arguments
from .settings import COUNTS, Settings
from .trainer import COLUMNS, Trainer

__all__ = ["add_arguments", "main"]

T = TypeVar("T")

RUNS = Path("runs")
CHECKPOINT, METRICS = "checkpoint.pt", "metrics.csv"
FIGURE, REPORT = "figure.png", "report.json"
EXTRAS = ("matplotlib", "PIL", "sklearn", "tqdm")


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m fastvae train` and return the exit status.

    0; 1 if the loss became NaN or infinite; 130 if interrupted. What the user can put right exits
    with status 2 and one message, as argparse does.
    """
    with parallel.joined():
        return _main(arguments)


def _main(arguments: argparse.Namespace) -> int:
    error: Callable[[str], NoReturn] = arguments.error
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        error(f"not installed: {', '.join(missing)}; want pip install 'fastvae-kernels[train]'")
    swept = [name for name in SWEEPS if getattr(arguments, f"sweep_{name}") is not None]
    if len(swept) > 1:
        error(f"argument --sweep-{swept[1]}: --sweep-{swept[0]} is given; want one of them")
    name = "-sweep-".join([_run_name(arguments.data or Settings.data), *swept])
    folder = RUNS / name
    if arguments.out is not None:
        folder = arguments.out
    elif arguments.resume:
        folder = _attempt(arguments, "--resume", _latest_run, name)
    is_new = arguments.out is None and not arguments.resume
    folder = parallel.agreed(folder)
    with ExitStack() as stack:
        if arguments.backend is not None:
            backend = _attempt(arguments, "--backend", use_backend, arguments.backend)
            _attempt(arguments, "--backend", stack.enter_context, backend)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(arguments.threads)  # 1 is as fast for digits, also on a busy machine
        try:
            if swept:
                _sweep(arguments, swept[0], folder, is_new=is_new)
            else:
                _single(arguments, folder, arguments.resume, is_new=is_new)
        except KeyboardInterrupt:
            folder = getattr(arguments, "folder", folder)
            print(f"\ninterrupted; to go on: --resume --out {folder}", file=sys.stderr)
            return 130
        except FloatingPointError as problem:
            print(f"stopped: {problem}", file=sys.stderr)
            return 1
    return 0


def _attempt(
    arguments: argparse.Namespace, argument: str, function: Callable[..., T], *values: Any
) -> T:
    """Calls a function; what it objects to is the fault of an argument."""
    try:
        return function(*values)
    except (OSError, RuntimeError, ValueError) as problem:
        arguments.error(f"argument {argument}: {problem}")
        raise


def _sweep(arguments: argparse.Namespace, name: str, folder: Path, *, is_new: bool) -> None:
    """One run for each value of a setting, each in a folder of its own, and their comparison."""
    from . import sweep  # only here: it needs what may not be installed

    if is_new:
        folder = _new_folder(arguments, folder)
    runs = {}
    try:
        for value in getattr(arguments, f"sweep_{name}"):
            setattr(arguments, name, value)
            run = folder / f"{name}-{value}"
            # Of a sweep that was interrupted, some runs have not begun.
            runs[value] = _single(
                arguments, run, arguments.resume and parallel.agreed((run / CHECKPOINT).exists())
            )
    finally:
        if is_new and parallel.rank() == 0:
            with suppress(OSError):
                folder.rmdir()  # refused before its first run, it is empty
    if parallel.rank() == 0:
        sweep.compare(folder, name, runs)


def _single(
    arguments: argparse.Namespace, folder: Path, resume: bool, *, is_new: bool = False
) -> tuple[Trainer, dict[str, Any]]:
    """One run from its arguments to its files; the trainer, and its report."""
    state = (
        _attempt(arguments, "--resume", checkpoint.load, folder / CHECKPOINT) if resume else None
    )
    settings = _settings(arguments, state)
    dataset = _attempt(arguments, "--data", _dataset, settings, state)
    device = _attempt(arguments, "--device", _device, arguments.device)
    trainer = Trainer(settings, dataset.x, device)
    _attempt(arguments, "--data", trainer.model.likelihood.check, dataset.x.to(device))
    if is_new:
        folder = _new_folder(arguments, folder)
    try:
        with ExitStack() as stack:
            if parallel.rank() == 0:
                _attempt(arguments, "--out", _own, folder, stack, resume)
            if state is not None:
                trainer.load_state_dict(state)
            return trainer, _run(trainer, dataset, folder, arguments.log_likelihood_samples)
    except FloatingPointError as problem:
        raise FloatingPointError(
            f"{problem}; {folder / CHECKPOINT} holds epoch {len(trainer.history)}. Try a smaller "
            f"--lr than {settings.lr:g}, or a larger --sigma or --min-sigma"
        ) from problem


def _run(trainer: Trainer, dataset: data.Dataset, folder: Path, n_samples: int) -> dict[str, Any]:
    """Train to the last epoch, keeping the files of `folder` up to date, report and draw.

    Of several processes, the first has the files, and says what there is to say.
    """
    from . import figures

    if parallel.rank() > 0:
        _train(trainer, dataset.fingerprint(), folder)
        return {}
    backend = "native" if has_kernels(trainer.train) else "reference"
    print(
        f"training on {len(trainer.train)} examples, {len(trainer.heldout)} held out, "
        f"{trainer.train.device}, {backend} backend, into {folder}"
    )
    _train(trainer, dataset.fingerprint(), folder)
    order = trainer.split(len(dataset.x), trainer.settings.seed)
    labels = None if dataset.labels is None else dataset.labels[order.numpy()]
    x = torch.cat([trainer.heldout, trainer.train])
    model, seed = trainer.model.eval(), trainer.settings.seed
    figures.draw(folder / FIGURE, model, trainer.history, x, labels, seed=seed)
    report = trainer.report(n_samples)
    write_json(folder / REPORT, report)
    first, last = trainer.history[0], trainer.history[-1]
    print(
        f"held-out ELBO {first['heldout_elbo']:.2f} -> {last['heldout_elbo']:.2f} nats per example "
        f"(rate {last['heldout_rate']:.2f}, distortion {last['heldout_distortion']:.2f}), "
        f"{sum(row['seconds'] for row in trainer.history):.1f} s\n"
        f"held-out ln p(x) {report['log_likelihood']:.2f} ± "
        f"{report['log_likelihood_standard_error']:.2f} nats, {report['bits_per_dim']:.3f} "
        f"bits/dim, {report['active_units']} of {trainer.settings.latent_dim} units active\n"
        f"pictures    {folder / FIGURE}\n"
        f"metrics     {folder / METRICS}\n"
        f"report      {folder / REPORT}\n"
        f"checkpoint  {folder / CHECKPOINT}"
    )
    return report


def _train(trainer: Trainer, fingerprint: str, folder: Path) -> None:
    from tqdm import tqdm

    first = parallel.rank() == 0

    def save() -> None:
        if not first:
            return
        # metrics.csv is written from the checkpoint's history: a row is never lost or doubled.
        checkpoint.save(folder / CHECKPOINT, {**trainer.state_dict(), "data": fingerprint})
        write_csv(folder / METRICS, COLUMNS, trainer.history)

    save()  # also before the first epoch, so that there is something to resume
    epochs, done = trainer.settings.epochs, len(trainer.history)
    with tqdm(
        total=epochs * trainer.steps,
        initial=done * trainer.steps,
        unit="step",
        disable=None if first else True,
    ) as bar:
        for epoch in range(done + 1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            row = trainer.run_epoch(bar.update)
            save()
            shown = {key: f"{row[f'heldout_{key}']:.2f}" for key in ("elbo", "rate", "distortion")}
            bar.set_postfix(shown, refresh=False)


# ---- From arguments to what they mean ------------------------------------------------------------


def _settings(arguments: argparse.Namespace, state: dict[str, Any] | None) -> Settings:
    """What was typed, over the settings of the resumed run, over the defaults."""
    names = [field.name for field in dataclasses.fields(Settings)]
    typed = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if typed.get("data", data.DIGITS) != data.DIGITS:
        typed["data"] = str(Path(typed["data"]).resolve())  # to be found again from elsewhere
    saved: dict[str, Any] = {}
    if state is not None:
        # A run of an earlier version had what is now the default of a setting that it lacks.
        saved = {**dataclasses.asdict(Settings()), **state["settings"]}
        done = len(state["history"])
        for name, value in typed.items():
            if name != "epochs" and value != saved[name]:
                option = "--" + name.replace("_", "-")
                arguments.error(
                    f"argument {option}: is {value}; want the resumed run's {saved[name]}"
                )
        if typed.get("epochs", done) < done:
            arguments.error(
                f"argument --epochs: is {typed['epochs']}; want at least the resumed run's {done}"
            )
    try:
        return Settings(**{**saved, **typed})
    except ValueError as problem:
        arguments.error(str(problem))
        raise


def _dataset(settings: Settings, state: dict[str, Any] | None) -> data.Dataset:
    """The data set, which must be that of the resumed run."""
    source = settings.data
    dataset = data.load(source, counts=settings.likelihood in COUNTS)
    if state is not None and state["data"] != dataset.fingerprint():
        raise ValueError(
            f"{source} has shape and checksum {dataset.fingerprint()}; want the resumed run's "
            f"{state['data']}"
        )
    return dataset


def _device(name: str | None) -> torch.device:
    if name is None:
        return parallel.local_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError):  # unknown, absent, or without memory of its own
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"is {name!r}; want a device of this machine: {', '.join(here)}") from None
    return device


def _run_name(source: str) -> str:
    return Path(source).stem or "data"


def _latest_run(name: str) -> Path:
    """The run, or the sweep, of a name that was saved last."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    saved = (*RUNS.glob(f"*/{CHECKPOINT}"), *RUNS.glob(f"*/*/{CHECKPOINT}"))
    found = [path for path in saved if pattern.fullmatch(path.relative_to(RUNS).parts[0])]
    if not found:
        raise ValueError(f"no run of {name} in {RUNS}; want --out with the folder of a run")
    latest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return RUNS / latest.relative_to(RUNS).parts[0]


def _new_folder(arguments: argparse.Namespace, path: Path) -> Path:
    """One that nobody else has, which an interruption can name."""
    made = claim.new_folder(path) if parallel.rank() == 0 else path
    arguments.folder = parallel.agreed(made)
    return arguments.folder


def _own(folder: Path, stack: ExitStack, resume: bool) -> None:
    """Hold a run's folder; if the run is new, nothing of an earlier one is written over."""
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(claim.held(folder))
    if resume:
        return
    found = [name for name in (CHECKPOINT, METRICS, FIGURE, REPORT) if (folder / name).exists()]
    if found:
        raise ValueError(
            f"is {folder}, where a run left {', '.join(found)}; want --resume too, to go on with "
            "that run, or another folder"
        )
