"""What an ELBO objective pays for the rate KL(q || p), and schedules of its weight.

A penalty maps the KL of a batch to one number of nats. Its fields are plain attributes: a trainer
sets them anew in each step, to the value of a schedule, which is any function of the step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from torch import Tensor

__all__ = ["Beta", "Capacity", "Cyclical", "FreeBits", "Linear", "Penalty", "check_not_negative"]


class Penalty(Protocol):
    """What `ELBO` takes as `penalty`."""

    elementwise: bool
    """Whether it wants the KL of every latent dimension, [B, *latent_shape], instead of [B]."""

    def __call__(self, kl: Tensor) -> Tensor:
        """The penalty, 0-d, of a batch's KL."""


@dataclasses.dataclass
class Beta:
    """beta KL, averaged over the batch: 1 is the ELBO, others the beta-VAE (Higgins et al. 2017).

    Args:
        beta: weight, at least 0.

    Raises:
        ValueError: `beta` out of range.
    """

    beta: float = 1.0
    elementwise: bool = dataclasses.field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_not_negative("beta", self.beta)

    def __call__(self, kl: Tensor) -> Tensor:
        return self.beta * kl.mean()


@dataclasses.dataclass
class Capacity:
    """gamma |KL - C|: holds the rate at C nats (Burgess et al. 2018, "Understanding disentangling
    in beta-VAE", where C grows while training).

    Args:
        capacity: C, at least 0.
        gamma: weight, at least 0.
        per_example: compare each example's KL with C, instead of the batch's mean.

    Raises:
        ValueError: a number out of range.
    """

    capacity: float
    gamma: float = 10.0
    per_example: bool = False
    elementwise: bool = dataclasses.field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_not_negative("capacity", self.capacity)
        check_not_negative("gamma", self.gamma)

    def __call__(self, kl: Tensor) -> Tensor:
        if not self.per_example:
            kl = kl.mean()
        return self.gamma * (kl - self.capacity).abs().mean()


@dataclasses.dataclass
class FreeBits:
    """beta sum_j max(lambda, KL_j): the first lambda nats of each group j of latent dimensions cost
    nothing (Kingma et al. 2016, "Improving variational inference with inverse autoregressive flow",
    appendix), KL_j being the batch's mean.

    Args:
        nats: lambda, at least 0.
        groups: how many groups of equal size the latent dimensions, in C order, are cut into;
            None: every dimension is one.
        per_example: take the maximum in each example, and then the mean.
        beta: weight, at least 0.

    Raises:
        ValueError: a number out of range, or `groups` does not divide the latent's size.
    """

    nats: float
    groups: int | None = None
    per_example: bool = False
    beta: float = 1.0
    elementwise: bool = dataclasses.field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_not_negative("nats", self.nats)
        check_not_negative("beta", self.beta)

    def __call__(self, kl: Tensor) -> Tensor:
        kl = kl.flatten(1)
        if self.groups is not None:
            if self.groups < 1 or kl.shape[1] % self.groups:
                raise ValueError(
                    f"groups is {self.groups}; want a divisor of the latent's size, {kl.shape[1]}"
                )
            kl = kl.unflatten(1, (self.groups, -1)).sum(-1)
        if not self.per_example:
            kl = kl.mean(0, keepdim=True)
        return self.beta * kl.clamp(min=self.nats).sum(1).mean()


def check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; want a number of at least 0")


# ---- Schedules -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Linear:
    """From `start`, in step 0, to `end`, in step `steps` and from then on: KL warm-up (Bowman et
    al. 2016; Sønderby et al. 2016)."""

    end: float
    steps: int
    start: float = 0.0

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        return self.start + (self.end - self.start) * done


@dataclasses.dataclass(frozen=True)
class Cyclical:
    """A ramp of `Linear` over the first `ratio` of every `period` steps, and `end` for the rest of
    it, `cycles` times; then `end` (Fu et al. 2019, "Cyclical annealing schedule")."""

    end: float
    period: int
    cycles: int = 4
    ratio: float = 0.5
    start: float = 0.0

    def __call__(self, step: int) -> float:
        if step >= self.period * self.cycles:
            return self.end
        ramp = max(1, round(self.ratio * self.period))
        return Linear(self.end, ramp, self.start)(step % self.period)
