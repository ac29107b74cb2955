"""The options of `python -m fastvae train`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..backend import CHOICES
from .settings import (
    LIKELIHOODS,
    LR_SCHEDULES,
    OBJECTIVES,
    POSTERIORS,
    PRECISIONS,
    PRIORS,
    SIGMAS,
    Settings,
)

__all__ = ["SWEEPS", "add_arguments"]

SWEEPS = ("beta", "sigma", "samples", "seed")
"""Settings of which `--sweep-...` compares several values."""


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


# Limits are beyond sense, and within int64 and float32, also for a sigma's square.
_WHOLE = _number(int, "a whole number above 0 and below 2^31", lambda n: 0 < n < 2**31)
_COUNT = _number(int, "a whole number of at least 0 and below 2^31", lambda n: 0 <= n < 2**31)
_LEVELS = _number(int, "a whole number of at least 2 and below 2^31", lambda n: 1 < n < 2**31)
_THREADS = _number(int, "a whole number above 0 and up to 1024", lambda n: 0 < n <= 1024)
_SEED = _number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
_POSITIVE = _number(float, "a number above 0, from 1e-30 to 1e30", lambda v: 1e-30 <= v <= 1e30)
_NOT_NEGATIVE = _number(float, "a number of at least 0 and up to 1e30", lambda v: 0 <= v <= 1e30)
_SCALE = _number(float, "a number above 0, from 1e-15 to 1e15", lambda v: 1e-15 <= v <= 1e15)
_SHARE = _number(float, "a number from 0 to 1", lambda v: 0 <= v <= 1)


def _sigma(text: str) -> float | str:
    wanted = f"a number above 0, or {', '.join(SIGMAS)}; a number from 1e-15 to 1e15"
    return text if text in SIGMAS else _number(float, wanted, lambda v: 1e-15 <= v <= 1e15)(text)


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is ''; want a name")
    return text


def _folder(text: str) -> Path:
    return Path(_name(text))


# Name, type or choices, help. Each is a field of `Settings`, from which the default is.
_SETTINGS: dict[str, tuple[tuple[str, Callable[[str], Any] | tuple[str, ...], str], ...]] = {
    "data and training": (
        (
            "data",
            _name,
            "'digits', an .npz or .npy array, a folder of images; for counts also a sparse .npz, "
            "or an .h5ad file",
        ),
        ("epochs", _WHOLE, "passes over the data, those before --resume included"),
        ("batch-size", _WHOLE, "examples in a step"),
        ("lr", _POSITIVE, "learning rate of Adam"),
        (
            "lr-schedule",
            LR_SCHEDULES,
            "cosine lowers the learning rate to 0 over all epochs; --resume with more --epochs "
            "goes on along the longer cosine",
        ),
        (
            "precision",
            PRECISIONS,
            "bfloat16: the networks' layers in half precision while training (torch.autocast); "
            "weights, likelihood, KL and all held-out values stay in float32",
        ),
        (
            "compile",
            bool,
            "compile encoder and decoder with torch.compile, which takes a while at first and "
            "changes the rounding",
        ),
        (
            "patience",
            _WHOLE,
            "stop when the held-out ELBO has not risen for so many epochs, and report and draw the "
            "model of the best epoch",
        ),
        ("seed", _SEED, "of weights, split, order and noise"),
    ),
    "model": (
        ("latent-dim", _WHOLE, "size of the latent"),
        ("hidden", _WHOLE, "size of the hidden layers"),
        ("layers", _COUNT, "number of hidden layers; 0 is a linear VAE"),
        ("likelihood", LIKELIHOODS, "p(x | z)"),
        (
            "sigma",
            _sigma,
            "scale of a Gaussian or Laplace likelihood: a number; learned: one for all pixels, one "
            "a channel, or one a pixel; given by the decoder; or optimal for the batch",
        ),
        ("min-sigma", _SCALE, "floor of a sigma that is not a number"),
        ("bins", _LEVELS, "levels of a logistic or categorical likelihood, from 0 to 1"),
        ("prior", PRIORS, "p(z)"),
        ("components", _WHOLE, "of a mixture or vamp prior"),
        ("posterior", POSTERIORS, "covariance of q(z | x)"),
    ),
    "objective": (
        (
            "objective",
            OBJECTIVES,
            "stl is the ELBO by sticking the landing; beta-tc weighs the total correlation by "
            "beta; info has the MMD of the aggregate posterior and the prior; dip its covariance",
        ),
        ("samples", _WHOLE, "of z for each example"),
        ("beta", _NOT_NEGATIVE, "weight of the KL divergence"),
        ("warmup", _COUNT, "epochs in which beta, or the capacity, rises from 0"),
        ("cycles", _WHOLE, "warm-ups, each followed by as many epochs at the full value"),
        ("capacity", _NOT_NEGATIVE, "pay beta |KL - capacity|, in nats, instead of beta KL"),
        ("free-bits", _NOT_NEGATIVE, "nats of each latent dimension that cost nothing"),
        ("alpha", _SHARE, "of info: the share of the KL that is not paid"),
        ("mmd", _NOT_NEGATIVE, "of info: lambda; the MMD is weighted by alpha + lambda - 1"),
        ("dip", _NOT_NEGATIVE, "of dip: weight of the covariance's difference from I"),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m fastvae train`."""
    for title, options in _SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, kind, text in options:
            # The default is not argparse's, because --resume must know what was typed.
            default = getattr(Settings, name.replace("-", "_"))
            known: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            if kind is bool:
                known = {"action": "store_true", "default": None}
            group.add_argument(f"--{name}", **known, help=f"{text} (default: {default})")
            if name in SWEEPS:
                sweep = f"one run for each value of --{name}, and a figure that compares them"
                group.add_argument(f"--sweep-{name}", **known, nargs="+", help=sweep)
    run = parser.add_argument_group("run")
    run.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    run.add_argument(
        "--backend",
        choices=CHOICES,
        help="kernels, or one of three ways in plain PyTorch (default: FASTVAE_BACKEND, or native)",
    )
    run.add_argument(
        "--threads",
        type=_THREADS,
        default=1,
        help="of the CPU; more pay for large models only, and change the rounding (default: 1)",
    )
    run.add_argument(
        "--workers",
        type=_THREADS,
        default=1,
        help="threads that read a folder of images, which then stays in memory (default: 1)",
    )
    run.add_argument(
        "--log-likelihood-samples",
        type=_WHOLE,
        default=1000,
        metavar="N",
        help="importance samples for each held-out example's ln p(x) at the end (default: 1000)",
    )
    run.add_argument(
        "--out", type=_folder, help="folder of the run (default: a new one, such as runs/digits-2)"
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out (default: the latest, on --data if that is given), under "
        "its own settings",
    )
    run.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the curves for TensorBoard too, into the run's folder",
    )
    parser.set_defaults(error=parser.error)  # for what shows only after parsing
