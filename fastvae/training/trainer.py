"""`Trainer`: a run of `python -m fastvae train`, without its files and its command line."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models import conditions
from ..models.vae import VAE
from ..ops import draw_seed
from . import parallel
from .counts import Statistics, replicate
from .settings import Settings, annealing, build_model, lr_schedule

__all__ = ["COLUMNS", "Trainer"]

_REPORTED = 1000

COLUMNS = (
    "epoch",
    "train_elbo",
    "train_rate",
    "train_distortion",
    "heldout_elbo",
    "heldout_rate",
    "heldout_distortion",
    "seconds",
)


class Trainer:
    """One run: the model, its optimizer, its data and the metrics of the epochs so far.

    A tenth of the data, at least one example, is held out; the others are `x[rows]`. The order of
    the data and all noise follow from the seed and the number of the epoch alone, so that the state
    at the end of an epoch needs no random-number generator to go on from, bit for bit, as if it had
    never stopped.

    Under torchrun every process has the whole model and the whole data, and computes its share of
    each batch; all take the same steps.

    Args:
        settings: see `Settings`; `data` and `epochs` are the caller's business.
        x: the data set, [N, ...].
        device: where to train.
        model: one of your own, trained from the weights that it has, in place of the one that the
            settings mean. Those that say how to train hold for it.
        condition: what `model` is conditioned on: a tensor [N, ...], or dictionaries, lists and
            tuples of such, nested as you like, of which a batch is given its rows. What has one row
            is shared by all examples.

    Raises:
        ValueError: settings that do not go with the data; a tensor of the condition with another
            number of rows, which the message names; a condition without a model.
    """

    def __init__(
        self,
        settings: Settings,
        x: Tensor,
        device: torch.device,
        *,
        model: VAE | None = None,
        condition: Any = None,
    ) -> None:
        if condition is not None and model is None:
            raise ValueError("condition is given without a model; want one whose networks take it")
        self.settings = settings
        order = self.split(len(x), settings.seed).to(device)
        held_out = max(1, len(x) // 10)
        self.x = x.to(device)  # not copied where it is there already
        self.condition = conditions.each_tensor(condition, lambda t, _: t.to(device))
        self.heldout, self.heldout_condition = self._examples(order[:held_out])
        self.rows = order[held_out:]
        if model is None:
            with torch.random.fork_rng(devices=[]):  # the same weights on every device
                torch.manual_seed(settings.seed)
                model = build_model(self.x, self.rows, settings)
        self.model = model.to(device)
        if settings.compile:
            for network in (self.model.encoder, self.model.decoder):
                network.forward = torch.compile(network.forward)  # the names of weights stay
        self.annealing = annealing(settings, self.steps)
        self.lr_schedule = lr_schedule(settings, self.steps)
        self.optimizer = torch.optim.Adam(self._parameter_groups(), lr=settings.lr)
        self._lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        """With `patience`, the epoch of the highest held-out ELBO, and its weights."""

    @staticmethod
    def split(n: int, seed: int) -> Tensor:
        """The order of the examples of which the first are held out."""
        return torch.from_numpy(np.random.default_rng(seed).permutation(n))

    def _examples(self, rows: Tensor) -> tuple[Tensor, Any]:
        """x of these rows, and their condition."""
        of_rows = conditions.of_each_example(self.condition, len(self.x), lambda t: t[rows])
        return self.x[rows], of_rows

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """A learned sigma apart: it has a long way to go, and Adam moves it by lr in a step."""
        scale = list(self.model.likelihood.parameters())
        others = [p for p in self.model.parameters() if all(p is not own for own in scale)]
        groups: list[dict[str, Any]] = [{"params": others}]
        return [*groups, {"params": scale, "lr": 10 * self.settings.lr}] if scale else groups

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(len(self.rows) / self.settings.batch_size)

    @property
    def is_done(self) -> bool:
        """After the last epoch, or when patience is at an end."""
        epochs, patience = len(self.history), self.settings.patience
        is_stalled = (
            patience is not None
            and self.best is not None
            and epochs - self.best["epoch"] >= patience
        )
        return is_stalled or epochs >= self.settings.epochs

    def run_epoch(self, after_step: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Train for one epoch and return its metrics, also appended to `history`.

        The training metrics are means over the epoch, while the weights move.

        Raises:
            FloatingPointError: a metric is NaN or infinite. The weights are then lost.
        """
        start = time.perf_counter()
        epoch = len(self.history) + 1
        rng = np.random.default_rng((self.settings.seed, epoch))
        order = torch.from_numpy(rng.permutation(len(self.rows))).to(self.x.device)
        seeds = torch.from_numpy(rng.integers(2**63, size=self.steps)).to(self.x.device)
        totals = _Totals(self.rows)
        self.model.train()
        batches = self.rows[order].split(self.settings.batch_size)
        for step, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            self._anneal(step + (epoch - 1) * self.steps)
            self.optimizer.zero_grad()
            if parallel.size() == 1:
                with self._precision():
                    output = self.model(*self._examples(batch), seed=seed)
                output.loss.backward()
                totals.add(output.kl, output.log_likelihood)
            else:
                self._share_step(batch, seed, totals)
            self.optimizer.step()
            after_step()
        parallel.add_up(totals.sums)
        row = {
            "epoch": epoch,
            **totals.metrics("train"),
            **self.evaluate(),
            "seconds": round(time.perf_counter() - start, 4),
        }
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{bad[0]} is {row[bad[0]]} in epoch {epoch}")
        highest = max((earlier["heldout_elbo"] for earlier in self.history), default=-math.inf)
        self.history.append(row)
        if self.settings.patience is not None and row["heldout_elbo"] > highest:
            model = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.best = {"epoch": epoch, "model": model}
        return row

    def restore_best(self) -> int:
        """Give the model the weights of its best epoch, where `patience` asks for that; the epoch
        whose weights it has."""
        if self.best is None:
            return len(self.history)
        self.model.load_state_dict(self.best["model"])
        return int(self.best["epoch"])

    def _precision(self) -> torch.autocast:
        """That of the networks in a training step."""
        is_half = self.settings.precision == "bfloat16"
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=is_half)

    def _share_step(self, batch: Tensor, seed: Tensor, totals: _Totals) -> None:
        """Gradients of a batch whose rows are shared out among processes.

        Every row has its own seed, so that its noise does not depend on how many processes there
        are. Losses are weighted by rows, as the mean over the whole batch does; what is not a mean
        over rows (an optimal sigma, a capacity) is each process's own.
        """
        own = parallel.own_rows(batch)
        if len(own):
            generator = torch.Generator().manual_seed(int(seed))
            seeds = draw_seed(generator, batch=len(batch)).to(batch.device)
            with self._precision():
                output = self.model(*self._examples(own), seed=parallel.own_rows(seeds))
            (output.loss * (len(own) / len(batch))).backward()
            totals.add(output.kl, output.log_likelihood)
        parallel.add_gradients(list(self.model.parameters()))

    def _anneal(self, step: int) -> None:
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * self.lr_schedule(step)
        if self.annealing is not None:
            name, schedule = self.annealing
            setattr(self.model.objective.penalty, name, schedule(step))  # type: ignore[attr-defined]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out data, under the same noise every time."""
        totals = _Totals(self.heldout)
        self.model.eval()
        size = self.settings.batch_size
        batches = conditions.batches(self.heldout, self.heldout_condition, size)
        for seed, (batch, condition) in enumerate(batches):
            output = self.model(batch, condition, seed=seed)
            totals.add(output.kl, output.log_likelihood)
        return totals.metrics("heldout")

    def report(self, n_samples: int) -> dict[str, Any]:
        """`VAE.report` of the held-out data, at most its first 1000 examples, and the mean of their
        ln p(x) by importance sampling with `n_samples`; under the same noise every time."""
        x = self.heldout[:_REPORTED]
        condition = conditions.of_each_example(
            self.heldout_condition, len(self.heldout), lambda t: t[:_REPORTED]
        )
        self.model.eval()
        batches = conditions.batches(x, condition, self.settings.batch_size)
        estimates = [
            self.model.log_likelihood(batch, n_samples, c, seed=seed)
            for seed, (batch, c) in enumerate(batches)
        ]
        value, error, ess = (torch.cat(parts) for parts in zip(*estimates, strict=True))
        counts = {}
        if self.model.likelihood.whole:
            model = Statistics.of(replicate(self.model, x, condition)).summary()
            counts = {"counts": {"data": Statistics.of(x).summary(), "model": model}}
        return {
            **self.model.report(x, condition=condition, seed=0).as_dict(),
            "log_likelihood": value.mean().item(),
            "log_likelihood_standard_error": error.square().sum().sqrt().item() / len(x),
            "log_likelihood_samples": n_samples,
            "effective_sample_size": ess.median().item(),
            **counts,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, but for the data."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            **({} if self.best is None else {"best": self.best}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, in a run of the same settings and data.

        Raises:
            ValueError: the state is of another model than these settings mean.
        """
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:  # several lines, for programmers
            raise ValueError(
                "the checkpoint's weights are not those of the model that its settings mean in "
                "this version of fastvae; want the version that began the run"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]
        self.best = state.get("best")


class _Totals:
    """Sums over examples, on their device: reading them there would wait in every step."""

    def __init__(self, examples: Tensor) -> None:
        self.n = len(examples)
        self.sums = torch.zeros(2, dtype=torch.float64, device=examples.device)

    def add(self, kl: Tensor, log_likelihood: Tensor) -> None:
        self.sums += torch.stack([kl.detach().sum(), -log_likelihood.detach().sum()])

    def metrics(self, split: str) -> dict[str, float]:
        rate, distortion = (self.sums / self.n).tolist()
        return {
            f"{split}_elbo": -rate - distortion,
            f"{split}_rate": rate,
            f"{split}_distortion": distortion,
        }
