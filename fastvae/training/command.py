"""`python -m fastvae train`: trains a VAE and draws what it learned.

A run is a folder of four files: checkpoint.pt, from which `--resume` goes on bit for bit;
metrics.csv, one row an epoch, in nats per example; and at the end figure.png, and report.json on
the held-out data. A sweep is a folder of runs, with a table and a figure that compare them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from ..backend import path, use_backend
from ..files import write_csv, write_json
from . import checkpoint, claim, data, events, parallel, runs
from .options import SWEEPS, add_arguments
from .runs import CHECKPOINT, FIGURE, METRICS, REPORT, RUNS
from .settings import COUNTS, Settings
from .trainer import COLUMNS, Trainer

__all__ = ["add_arguments", "main"]

T = TypeVar("T")

EXTRAS = ("matplotlib", "PIL", "sklearn", "tqdm")


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m fastvae train` and return the exit status.

    0; 1 if the loss became NaN or infinite, a file could not be written or memory did not suffice;
    130 if interrupted. What the user can put right exits with status 2 and one message, as argparse
    does.
    """
    with parallel.joined():
        return _main(arguments)


def _main(arguments: argparse.Namespace) -> int:
    error: Callable[[str], NoReturn] = arguments.error
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        error(f"not installed: {', '.join(missing)}; want pip install 'fastvae-kernels[train]'")
    if arguments.tensorboard and importlib.util.find_spec("tensorboard") is None:
        error(
            "argument --tensorboard: not installed; want pip install 'fastvae-kernels[tensorboard]'"
        )
    given = [name for name in SWEEPS if getattr(arguments, f"sweep_{name}") is not None]
    if len(given) > 1:
        error(f"argument --sweep-{given[1]}: --sweep-{given[0]} is given; want one of them")
    swept = given[0] if given else None
    if arguments.data is not None:
        arguments.data = _attempt(arguments, "--data", runs.source, arguments.data)
    folder = arguments.out
    if folder is None and arguments.resume:
        folder = _attempt(arguments, "--resume", runs.latest, arguments.data, swept)
    # None: a new one, once all else is known to be right.
    arguments.folder, arguments.started = parallel.agreed(folder), False
    with ExitStack() as stack:
        if arguments.backend is not None:
            backend = _attempt(arguments, "--backend", use_backend, arguments.backend)
            _attempt(arguments, "--backend", stack.enter_context, backend)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(arguments.threads)  # 1 is as fast for digits, also on a busy machine
        try:
            if swept:
                _sweep(arguments, swept, stack)
            else:
                _single(arguments, stack)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {_advice(arguments, swept)}", file=sys.stderr)
            return 130
        except (FloatingPointError, MemoryError, OSError, RuntimeError) as problem:
            if not _is_outside(problem):
                raise
            advice = "" if isinstance(problem, FloatingPointError) else _advice(arguments, swept)
            first = str(problem).partition("\n")[0]
            print(f"stopped: {first}" + (advice and f"; {advice}"), file=sys.stderr)
            return 1
    return 0


def _is_outside(problem: Exception) -> bool:
    """Whether it says what it is without a traceback."""
    if not isinstance(problem, RuntimeError):
        return True
    from torch._dynamo.exc import TorchDynamoException  # imported only here: it takes a second

    is_memory = isinstance(problem, torch.OutOfMemoryError) or "allocate memory" in str(problem)
    return is_memory or isinstance(problem, TorchDynamoException)


def _advice(arguments: argparse.Namespace, swept: str | None) -> str:
    """How to go on, if there is something to go on with."""
    folder = arguments.folder
    if folder is None or not ((arguments.resume or arguments.started) and runs.can_resume(folder)):
        return "nothing was saved yet"
    values = [] if swept is None else [f"--sweep-{swept}", *getattr(arguments, f"sweep_{swept}")]
    return f"to go on: --resume --out {' '.join(map(str, [folder, *values]))}"


def _attempt(
    arguments: argparse.Namespace, argument: str, function: Callable[..., T], *values: Any
) -> T:
    """Calls a function; what it objects to is the fault of an argument."""
    try:
        return function(*values)
    except (OSError, RuntimeError, ValueError) as problem:
        arguments.error(f"argument {argument}: {problem}")
        raise


def _single(arguments: argparse.Namespace, stack: ExitStack) -> None:
    """One run."""
    state = _state(arguments, arguments.folder, stack) if arguments.resume else None
    settings = _settings(arguments, state)
    dataset = _attempt(arguments, "--data", _dataset, settings, state, arguments.workers)
    trainer = _trainer(arguments, settings, dataset, state)
    if arguments.folder is None:
        _make_folder(arguments, runs.name(settings.data))
    _run(arguments, trainer, dataset, arguments.folder, is_new=state is None)


def _sweep(arguments: argparse.Namespace, name: str, stack: ExitStack) -> None:
    """One run for each value of a setting, each in a folder of its own, and their comparison.

    All are checked before the first begins.
    """
    from . import sweep  # only here: it needs what may not be installed

    values = getattr(arguments, f"sweep_{name}")
    for i, value in enumerate(values):
        if value in values[:i]:
            arguments.error(f"argument --sweep-{name}: has {value} twice; want each value once")
    states: dict[Any, dict[str, Any]] = {}
    for value in values if arguments.resume else []:
        run = arguments.folder / f"{name}-{value}"
        if parallel.agreed((run / CHECKPOINT).exists()):
            states[value] = _state(arguments, run, stack)
    if arguments.resume and not states:
        arguments.error(f"argument --resume: {arguments.folder} holds no run of such a sweep")
    # Of a sweep that was interrupted, some runs have not begun: they are like the others.
    like = next(iter(states.values()), None)
    settings = {}
    for value in values:
        setattr(arguments, name, value)
        settings[value] = _settings(arguments, states.get(value, like), but_for=name)
    dataset = _attempt(arguments, "--data", _dataset, settings[values[0]], like, arguments.workers)
    trainers = {
        value: _trainer(arguments, settings[value], dataset, states.get(value)) for value in values
    }
    if arguments.folder is None:
        _make_folder(arguments, f"{runs.name(settings[values[0]].data)}-sweep-{name}")
    done = {}
    for value, trainer in trainers.items():
        run = arguments.folder / f"{name}-{value}"
        report = _run(arguments, trainer, dataset, run, is_new=value not in states)
        done[value] = trainer, report
    if parallel.rank() == 0:
        sweep.compare(arguments.folder, name, done)


def _make_folder(arguments: argparse.Namespace, name: str) -> None:
    """One that nobody else has, which an interruption can name."""
    made = None
    if parallel.rank() == 0:
        made = _attempt(arguments, "--out", claim.new_folder, RUNS / name)
    arguments.folder = parallel.agreed(made)


def _run(
    arguments: argparse.Namespace,
    trainer: Trainer,
    dataset: data.Dataset,
    folder: Path,
    *,
    is_new: bool,
) -> dict[str, Any]:
    """One run, from where it stands to its end; its report."""
    with ExitStack() as stack:
        if is_new and parallel.rank() == 0:
            _attempt(arguments, "--out", runs.own, folder, stack)
        arguments.started = True
        try:
            return _complete(arguments, trainer, dataset, folder)
        except FloatingPointError as problem:
            raise FloatingPointError(
                f"{problem}; {folder / CHECKPOINT} holds epoch {len(trainer.history)}. Try a "
                f"smaller --lr than {trainer.settings.lr:g}, or a larger --sigma or --min-sigma"
            ) from problem


def _complete(
    arguments: argparse.Namespace, trainer: Trainer, dataset: data.Dataset, folder: Path
) -> dict[str, Any]:
    """Train to the last epoch, keeping the files of `folder` up to date, report and draw.

    Of several processes, the first has the files, and says what there is to say.
    """
    from . import figures

    if trainer.settings.compile:
        torch.compiler.reset()  # what earlier runs compiled counts against a limit
    fingerprint = dataset.fingerprint()
    if parallel.rank() > 0:
        _train(trainer, fingerprint, folder)
        return {}
    print(
        f"training on {len(trainer.rows)} examples, {len(trainer.heldout)} held out, "
        f"{trainer.x.device}, {path(trainer.x)} backend, into {folder}"
    )
    _train(trainer, fingerprint, folder, tensorboard=arguments.tensorboard)
    epoch = trainer.restore_best()
    # Held-out examples first.
    order = trainer.split(len(dataset.x), trainer.settings.seed)[: figures.POINTS]
    labels = None if dataset.labels is None else dataset.labels[order.numpy()]
    x = trainer.x[order.to(trainer.x.device)]
    model, seed = trainer.model.eval(), trainer.settings.seed
    figures.draw(folder / FIGURE, model, trainer.history, x, labels, seed=seed)
    report = {"epoch": epoch, **trainer.report(arguments.log_likelihood_samples)}
    write_json(folder / REPORT, report)
    first, last = trainer.history[0], trainer.history[epoch - 1]
    if epoch < len(trainer.history):
        print(f"the best of {len(trainer.history)} epochs was epoch {epoch}")
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


def _train(trainer: Trainer, fingerprint: str, folder: Path, *, tensorboard: bool = False) -> None:
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
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=epochs * trainer.steps,
                initial=done * trainer.steps,
                unit="step",
                disable=None if first else True,
            )
        )
        write = None
        if tensorboard and first:
            write = stack.enter_context(events.writing(folder, trainer.history))
        while not trainer.is_done:
            bar.set_description(f"epoch {len(trainer.history) + 1}/{epochs}", refresh=False)
            row = trainer.run_epoch(bar.update)
            save()
            if write is not None:
                write(row)
            shown = {key: f"{row[f'heldout_{key}']:.2f}" for key in ("elbo", "rate", "distortion")}
            bar.set_postfix(shown, refresh=False)


# ---- From arguments to what they mean ------------------------------------------------------------


def _state(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The checkpoint of a run, which nobody else goes on with from now on."""
    if parallel.rank() == 0 and folder.is_dir():
        _attempt(arguments, "--out", stack.enter_context, claim.held(folder))
    return _attempt(arguments, "--resume", checkpoint.load, folder / CHECKPOINT)


def _settings(
    arguments: argparse.Namespace, state: dict[str, Any] | None, but_for: str | None = None
) -> Settings:
    """What was typed, over the settings of the resumed run, over the defaults.

    Args:
        but_for: a setting in which the run may differ from that of the checkpoint.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    typed = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    saved: dict[str, Any] = {}
    if state is not None:
        # A run of an earlier version had what is now the default of a setting that it lacks.
        saved = {**dataclasses.asdict(Settings()), **state["settings"]}
        unknown = [name for name in saved if name not in names]
        if unknown:
            arguments.error(
                f"argument --resume: the run has the setting {unknown[0]}, which this version of "
                "fastvae does not know; want the version that began it"
            )
        done = len(state["history"])
        for name, value in typed.items():
            # Data are known by their checksum, wherever they are now.
            if name not in ("epochs", "data", but_for) and value != saved[name]:
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


def _dataset(settings: Settings, state: dict[str, Any] | None, workers: int) -> data.Dataset:
    """The data set, which must be that of the resumed run."""
    source = settings.data
    try:
        dataset = data.load(source, counts=settings.likelihood in COUNTS, workers=workers)
    except FileNotFoundError as problem:
        if state is None or source != state["settings"]["data"]:
            raise
        raise ValueError(
            f"{source!r} does not exist any more; want --data with where the data are now"
        ) from problem
    if state is not None and state["data"] != dataset.fingerprint():
        raise ValueError(
            f"{source} has shape and checksum {dataset.fingerprint()}; want the resumed run's "
            f"{state['data']}"
        )
    return dataset


def _trainer(
    arguments: argparse.Namespace,
    settings: Settings,
    dataset: data.Dataset,
    state: dict[str, Any] | None,
) -> Trainer:
    device = _attempt(arguments, "--device", _device, arguments.device)
    try:
        trainer = Trainer(settings, dataset.x, device)
    except ValueError as problem:
        arguments.error(str(problem))
        raise
    _attempt(arguments, "--data", trainer.model.likelihood.check, trainer.x)
    if state is not None:
        _attempt(arguments, "--resume", trainer.load_state_dict, state)
    return trainer


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
