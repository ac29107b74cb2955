"""`python -m fastvae train`: trains a VAE and draws what it learned.

A run is a folder of three files: checkpoint.pt, from which `--resume` goes on bit for bit;
metrics.csv, one row an epoch, in nats per example; figure.png, drawn at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from . import checkpoint, data
from .backend import use_backend
from .functional import has_kernels
from .trainer import COLUMNS, Settings, Trainer

__all__ = ["add_arguments", "main"]

T = TypeVar("T")

RUNS = Path("runs")
CHECKPOINT, METRICS, FIGURE = "checkpoint.pt", "metrics.csv", "figure.png"
EXTRAS = ("matplotlib", "PIL", "sklearn", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m fastvae train`."""
    whole = _number(int, "a whole number above 0", lambda n: n > 0)
    seed = _number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
    positive = _number(float, "a number above 0", lambda v: 0 < v < math.inf)
    not_negative = _number(float, "a number of at least 0", lambda v: 0 <= v < math.inf)
    options: tuple[tuple[str, Callable[[str], Any], str], ...] = (
        ("data", str, "'digits', an .npz or .npy array, or a folder of images"),
        ("epochs", whole, "passes over the data, those before --resume included"),
        ("latent-dim", whole, "size of the latent"),
        ("hidden", whole, "size of the hidden layers"),
        ("beta", not_negative, "weight of the KL divergence"),
        ("sigma", positive, "standard deviation of the likelihood"),
        ("batch-size", whole, "examples in a step"),
        ("lr", positive, "learning rate of Adam"),
        ("seed", seed, "of weights, split, order and noise"),
    )
    for name, kind, text in options:
        # The default is not argparse's, because --resume must know what was typed.
        default = getattr(Settings, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: {default})")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--backend",
        choices=("native", "reference"),
        help="compiled kernels or plain PyTorch (default: FASTVAE_BACKEND, or native)",
    )
    parser.add_argument(
        "--threads",
        type=whole,
        default=1,
        help="of the CPU; more pay for large models only, and change the rounding (default: 1)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the run (default: a new one, such as runs/digits-2)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out (default: the latest), under its own settings",
    )
    parser.set_defaults(error=parser.error)  # for what shows only after parsing


def main(arguments: argparse.Namespace) -> int:
    """Run `python -m fastvae train` and return the exit status.

    0; 1 if the loss became NaN or infinite; 130 if interrupted. What the user can put right exits
    with status 2 and one message, as argparse does.
    """
    error: Callable[[str], NoReturn] = arguments.error
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        error(f"not installed: {', '.join(missing)}; want pip install 'fastvae-kernels[train]'")

    def attempt(argument: str, function: Callable[..., T], *values: Any) -> T:
        try:
            return function(*values)
        except (OSError, RuntimeError, ValueError) as problem:
            error(f"argument {argument}: {problem}")

    folder, state = arguments.out, None
    if arguments.resume:
        folder = folder or attempt("--resume", _latest_run, arguments.data or Settings.data)
        state = attempt("--resume", checkpoint.load, folder / CHECKPOINT)
    settings = _settings(arguments, state, error)
    dataset = attempt("--data", _dataset, settings.data, state)
    device = attempt("--device", _device, arguments.device)
    with ExitStack() as stack:
        if arguments.backend is not None:
            attempt("--backend", stack.enter_context, use_backend(arguments.backend))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(arguments.threads)  # 1 is as fast for digits, also on a busy machine
        trainer = Trainer(settings, dataset.x, device)
        if state is None:
            folder = attempt("--out", _new_run, folder, settings.data)
        else:
            trainer.load_state_dict(state)
        try:
            _run(trainer, dataset, folder)
        except KeyboardInterrupt:
            print(f"\ninterrupted; to go on: --resume --out {folder}", file=sys.stderr)
            return 130
        except FloatingPointError as problem:
            print(
                f"stopped: {problem}; {folder / CHECKPOINT} holds epoch {len(trainer.history)}. "
                f"Try a smaller --lr than {settings.lr:g} or a --sigma above {settings.sigma:g}",
                file=sys.stderr,
            )
            return 1
    return 0


def _run(trainer: Trainer, dataset: data.Dataset, folder: Path) -> None:
    """Train to the last epoch, keeping the files of `folder` up to date, and draw."""
    from . import figures  # only here: they need what may not be installed

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
    first, last = trainer.history[0], trainer.history[-1]
    print(
        f"held-out ELBO {first['heldout_elbo']:.2f} -> {last['heldout_elbo']:.2f} nats per example "
        f"(rate {last['heldout_rate']:.2f}, distortion {last['heldout_distortion']:.2f}), "
        f"{sum(row['seconds'] for row in trainer.history):.1f} s\n"
        f"pictures    {folder / FIGURE}\n"
        f"metrics     {folder / METRICS}\n"
        f"checkpoint  {folder / CHECKPOINT}"
    )


def _train(trainer: Trainer, fingerprint: str, folder: Path) -> None:
    from tqdm import tqdm

    def save() -> None:
        # metrics.csv is written from the checkpoint's history: a row is never lost or doubled.
        checkpoint.save(folder / CHECKPOINT, {**trainer.state_dict(), "data": fingerprint})
        checkpoint.write_csv(folder / METRICS, COLUMNS, trainer.history)

    save()  # also before the first epoch, so that there is something to resume
    epochs, done = trainer.settings.epochs, len(trainer.history)
    with tqdm(
        total=epochs * trainer.steps, initial=done * trainer.steps, unit="step", disable=None
    ) as bar:
        for epoch in range(done + 1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            row = trainer.run_epoch(bar.update)
            save()
            shown = {key: f"{row[f'heldout_{key}']:.2f}" for key in ("elbo", "rate", "distortion")}
            bar.set_postfix(shown, refresh=False)


# ---- From arguments to what they mean ------------------------------------------------------------


def _number(
    kind: Callable[[str], float], wanted: str, allowed: Callable[[float], bool]
) -> Callable[[str], float]:
    """A `type` for argparse."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"is {text!r}; want {wanted}")
        return value

    return parse


def _settings(
    arguments: argparse.Namespace, state: dict[str, Any] | None, error: Callable[[str], NoReturn]
) -> Settings:
    """What was typed, over the settings of the resumed run, over the defaults."""
    names = [field.name for field in dataclasses.fields(Settings)]
    typed = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if typed.get("data", data.DIGITS) != data.DIGITS:
        typed["data"] = str(Path(typed["data"]).resolve())  # to be found again from elsewhere
    if state is None:
        return Settings(**typed)
    saved, done = state["settings"], len(state["history"])
    for name, value in typed.items():
        if name != "epochs" and value != saved[name]:
            option = "--" + name.replace("_", "-")
            error(f"argument {option}: is {value}; want the resumed run's {saved[name]}")
    if typed.get("epochs", done) < done:
        error(f"argument --epochs: is {typed['epochs']}; want at least the resumed run's {done}")
    return Settings(**{**saved, **typed})


def _dataset(source: str, state: dict[str, Any] | None) -> data.Dataset:
    """The data set, which must be that of the resumed run."""
    dataset = data.load(source)
    if state is not None and state["data"] != dataset.fingerprint():
        raise ValueError(
            f"{source} has shape and checksum {dataset.fingerprint()}; want the resumed run's "
            f"{state['data']}"
        )
    return dataset


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError):  # unknown, absent, or without memory of its own
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"is {name!r}; want a device of this machine: {', '.join(here)}") from None
    return device


def _run_name(source: str) -> str:
    return Path(source).stem or "data"


def _latest_run(source: str) -> Path:
    """The run of a data set that was saved last."""
    pattern = re.compile(re.escape(_run_name(source)) + r"(-\d+)?")
    found = [path for path in RUNS.glob(f"*/{CHECKPOINT}") if pattern.fullmatch(path.parent.name)]
    if not found:
        raise ValueError(f"no run of {source} in {RUNS}; want --out with the folder of a run")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def _new_run(folder: Path | None, source: str) -> Path:
    """Make the folder of a new run: nothing of an earlier one is ever written over."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        found = [name for name in (CHECKPOINT, METRICS, FIGURE) if (folder / name).exists()]
        if found:
            raise ValueError(
                f"is {folder}, where a run left {', '.join(found)}; want --resume too, to go on "
                "with that run, or another folder"
            )
        return folder
    folder, number = RUNS / _run_name(source), 1
    while folder.exists():
        number += 1
        folder = RUNS / f"{_run_name(source)}-{number}"
    folder.mkdir(parents=True)
    return folder
