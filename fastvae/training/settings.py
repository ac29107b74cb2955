"""`Settings`: what `python -m fastvae train` can be told, and the model that it means."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import aggregates, likelihoods, objectives, penalties, priors
from ..models.cholesky import CholeskyGaussian
from ..models.vae import VAE
from ..ops.bounds import Bound
from .counts import LogCounts
from .data import DIGITS

__all__ = [
    "COUNTS",
    "LIKELIHOODS",
    "LR_SCHEDULES",
    "OBJECTIVES",
    "POSTERIORS",
    "PRECISIONS",
    "PRIORS",
    "SIGMAS",
    "Settings",
    "annealing",
    "build_model",
    "lr_schedule",
]

LIKELIHOODS = (
    "gaussian",
    "laplace",
    "bernoulli",
    "continuous-bernoulli",
    "logistic",
    "logistic-mixture",
    "categorical",
    "poisson",
    "nb",
    "zinb",
)
COUNTS = ("poisson", "nb", "zinb")
"""Those of `LIKELIHOODS` whose data are counts."""
SIGMAS = ("learned", "channel", "pixel", "decoder", "optimal")
OBJECTIVES = ("elbo", "stl", "iwae", "dreg", "beta-tc", "info", "dip")
PRIORS = ("standard", "learned", "mixture", "vamp")
POSTERIORS = ("diagonal", "full")
LR_SCHEDULES = ("constant", "cosine")
PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides a run's numbers; kept in its checkpoint.

    Raises:
        ValueError: settings that do not go together.
    """

    data: str = DIGITS
    epochs: int = 100
    latent_dim: int = 6
    hidden: int = 256
    layers: int = 3
    likelihood: str = "gaussian"
    sigma: float | str = 0.2
    min_sigma: float = 0.01
    bins: int = 256
    prior: str = "standard"
    components: int = 20
    posterior: str = "diagonal"
    objective: str = "elbo"
    samples: int = 1
    beta: float = 1.0
    warmup: int = 0
    cycles: int = 1
    capacity: float | None = None
    free_bits: float = 0.0
    alpha: float = 0.0
    mmd: float = 10.0
    dip: float = 10.0
    batch_size: int = 64
    lr: float = 1e-3
    lr_schedule: str = "constant"
    precision: str = "float32"
    compile: bool = False
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        annealed = self.warmup or self.capacity is not None or self.free_bits
        if self.objective == "beta-tc" and annealed:
            raise ValueError(
                "objective beta-tc weighs the total correlation by beta; want no warm-up, capacity "
                "or free bits with it"
            )
        if self.objective not in ("elbo", "beta-tc") and (annealed or self.beta != 1):
            raise ValueError(
                f"objective {self.objective} has no weighted KL; want no beta, warm-up, capacity "
                "or free bits with it"
            )
        if self.objective in ("beta-tc", "info", "dip") and self.samples != 1:
            raise ValueError(f"objective {self.objective} takes one sample; want no others")
        if self.objective in ("beta-tc", "dip") and self.posterior != "diagonal":
            raise ValueError(f"objective {self.objective} wants a diagonal posterior")
        if self.capacity is not None and self.free_bits:
            raise ValueError("capacity and free bits are both given; want one of them")
        exact = self.posterior == "diagonal" and self.prior in ("standard", "learned")
        if self.free_bits and not exact:
            raise ValueError(
                "free bits need the KL of each latent dimension; want a diagonal posterior, and a "
                "standard or learned prior"
            )
        if isinstance(self.sigma, str):
            names = {"gaussian": SIGMAS, "laplace": ("learned",)}.get(self.likelihood, ())
            if self.sigma not in names:
                others = f" or one of {', '.join(names)}" if names else ""
                raise ValueError(
                    f"sigma is {self.sigma}, likelihood {self.likelihood}; want a number{others}"
                )
        if self.cycles > 1 and not self.warmup:
            raise ValueError("cycles are given without a warm-up; want the epochs of one ramp too")


def build_model(x: Tensor, rows: Tensor, settings: Settings) -> VAE:
    """A VAE of two multilayer perceptrons.

    Smooth activations: at the kinks of ReLU, the rounding differences between backends, instruction
    sets or devices grow until the loss curves part.

    Args:
        x: the data, [N, ...]; only its shape matters, but for a VampPrior, whose pseudo-inputs are
            at first the first training examples, and for counts, whose median total is that of
            samples.
        rows: indices of the training examples; beta-tc takes their number.

    Raises:
        ValueError: settings that do not go with the data.
    """
    shape, latent = x.shape[1:], settings.latent_dim
    full = settings.posterior == "full"
    params = latent * (latent + 3) // 2 if full else 2 * latent
    hidden = [settings.hidden] * settings.layers
    likelihood = _likelihood(x, rows, settings)
    outputs = likelihood.outputs
    model = VAE(
        nn.Sequential(
            *([LogCounts()] if settings.likelihood in COUNTS else []),
            nn.Flatten(),
            *_layers([shape.numel(), *hidden, params]),
        ),
        nn.Sequential(
            *_layers([latent, *hidden, outputs * shape.numel()]),
            nn.Unflatten(1, (outputs * shape[0], *shape[1:])),
        ),
        latent_shape=latent,
        likelihood=likelihood,
        objective=_objective(settings, len(rows)),
        posterior=CholeskyGaussian.from_params if full else None,
    )
    if settings.prior == "learned":
        model.prior = priors.LearnedGaussianPrior(latent)
    elif settings.prior == "mixture":
        model.prior = priors.MixturePrior(settings.components, latent)
    elif settings.prior == "vamp":
        if settings.components > len(rows):
            raise ValueError(
                f"components is {settings.components}, with {len(rows)} training examples; want at "
                "most as many, of which the components of a vamp prior are made"
            )
        model.prior = priors.VampPrior(model.encode, x[rows[: settings.components]])
    return model


def _layers(sizes: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return layers[:-1]


def _likelihood(x: Tensor, rows: Tensor, settings: Settings) -> likelihoods.Likelihood:
    shape, sigma, bins = x.shape[1:], settings.sigma, settings.bins
    if settings.likelihood in COUNTS:
        total = x.flatten(1).sum(1)[rows].median().clamp(min=1).item()
        library: dict[str, Any] = {"library": "observed", "library_size": total}
        if settings.likelihood == "poisson":
            return likelihoods.Poisson(**library)
        if settings.likelihood == "nb":
            return likelihoods.NegativeBinomial(shape, **library)
        return likelihoods.ZeroInflatedNegativeBinomial(shape, **library)
    if settings.likelihood == "gaussian" and not isinstance(sigma, str):
        return likelihoods.Gaussian(sigma)
    floor = Bound(2 * math.log(settings.min_sigma), math.inf, "soft")
    kinds: dict[str, Callable[[], likelihoods.Likelihood]] = {
        "learned": lambda: likelihoods.LearnedGaussian(bound=floor),
        "channel": lambda: likelihoods.LearnedGaussian(_of_each_channel(shape), bound=floor),
        "pixel": lambda: likelihoods.LearnedGaussian(shape, bound=floor),
        "decoder": lambda: likelihoods.HeteroscedasticGaussian(floor),
        "optimal": lambda: likelihoods.OptimalGaussian(bound=floor),
        "laplace": lambda: (
            likelihoods.Laplace(learned=True)
            if isinstance(sigma, str)
            else likelihoods.Laplace(sigma)
        ),
        "bernoulli": likelihoods.Bernoulli,
        "continuous-bernoulli": likelihoods.ContinuousBernoulli,
        "logistic": lambda: likelihoods.DiscretizedLogistic(bins),
        "logistic-mixture": lambda: likelihoods.DiscretizedLogisticMixture(5, bins),
        "categorical": lambda: likelihoods.Categorical(bins),
    }
    return kinds[str(sigma) if settings.likelihood == "gaussian" else settings.likelihood]()


def _of_each_channel(shape: torch.Size) -> tuple[int, ...]:
    """What broadcasts to an example [D], whose numbers are each a channel, [H, W] or [C, H, W]."""
    return (1, 1) if len(shape) == 2 else (shape[0], *(1,) * (len(shape) - 1))


def _objective(settings: Settings, examples: int) -> objectives.Objective:
    samples = settings.samples
    if settings.objective == "stl":
        return objectives.StickingTheLanding(samples)
    if settings.objective == "iwae":
        return objectives.IWAE(samples)
    if settings.objective == "dreg":
        return objectives.DReG(samples)
    if settings.objective == "beta-tc":
        return aggregates.BetaTC(examples, beta=settings.beta)
    if settings.objective == "info":
        return aggregates.InfoVAE(settings.alpha, settings.mmd)
    if settings.objective == "dip":
        return aggregates.DIPVAE(settings.dip, settings.dip)
    penalty: penalties.Penalty = penalties.Beta(settings.beta)
    if settings.capacity is not None:
        penalty = penalties.Capacity(settings.capacity, gamma=settings.beta)
    elif settings.free_bits:
        penalty = penalties.FreeBits(settings.free_bits, beta=settings.beta)
    return objectives.ELBO(penalty, samples)


def annealing(settings: Settings, steps: int) -> tuple[str, Callable[[int], float]] | None:
    """Which attribute of the penalty changes while training, and its value in a step.

    Args:
        steps: of an epoch.
    """
    if not settings.warmup:
        return None
    name = "beta" if settings.capacity is None else "capacity"
    end = settings.beta if settings.capacity is None else settings.capacity
    ramp = settings.warmup * steps
    if settings.cycles == 1:
        return name, penalties.Linear(end, ramp)
    return name, penalties.Cyclical(end, period=2 * ramp, cycles=settings.cycles)


def lr_schedule(settings: Settings, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate in a step: 1, or from 1 to 0 along half a cosine over all
    epochs (Loshchilov & Hutter 2017, "SGDR").

    It follows from the number of the step alone. A run that is resumed with more epochs goes on at
    the point of the longer cosine where it stands.

    Args:
        steps: of an epoch.
    """
    if settings.lr_schedule == "constant":
        return lambda step: 1.0
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / (settings.epochs * steps)))
