"""Objectives: what a VAE is trained by.

Each is called with a model and a batch, and gives a `VAEOutput`, whose `loss` is what is minimized.
With the log-weights ln w_k = ln p(x | z_k) + ln p(z_k) - ln q(z_k | x) of K samples z_k ~ q(z | x):

    ELBO                    E[ln p(x | z)] - KL(q || p)
    StickingTheLanding      the ELBO, its gradient without the score term
    IWAE                    ln 1/K sum_k w_k
    DReG                    the IWAE bound, its encoder's gradient doubly reparameterized

All bounds are lower bounds of ln p(x), in nats, of one example.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.arguments import whole
from .importance import LogWeights, log_mean_exp, log_weights
from .penalties import Beta, Penalty

if TYPE_CHECKING:
    from .vae import VAE

__all__ = ["ELBO", "IWAE", "DReG", "Objective", "StickingTheLanding", "VAEOutput"]


class VAEOutput(NamedTuple):
    """What an objective returns, for a batch of B examples; in nats."""

    loss: Tensor
    """0-d: what is minimized, averaged over the batch."""
    bound: Tensor
    """[B]: the objective's lower bound of ln p(x), without penalties other than the KL itself."""
    log_likelihood: Tensor
    """[B]: ln p(x | z), of which minus is the distortion; the mean over samples."""
    kl: Tensor
    """[B]: KL(q(z | x) || p(z)), the rate; exact, or estimated from the samples."""
    z: Tensor
    """The latent sample, of q's shape; [K, ...] where an objective draws several."""
    decoded: Tensor
    """decoder(z), the parameters of p(x | z); the mean itself where the likelihood is Gaussian."""


class Objective(Protocol):
    """What a VAE takes as `objective`."""

    def __call__(
        self,
        model: VAE,
        x: Tensor,
        condition: Any = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> VAEOutput: ...


@dataclasses.dataclass
class ELBO:
    """Distortion + penalty of the rate: -E[ln p(x | z)] + beta KL(q(z | x) || p(z)).

    With beta = 1 its negative is the evidence lower bound (Kingma & Welling 2014, "Auto-Encoding
    Variational Bayes"), below ln p(x) by the gap KL(q(z | x) || p(z | x)).

    Args:
        penalty: `Beta`, `Capacity` or `FreeBits`; a plain attribute, as its fields are.
        samples: of z for each example, over which the log-likelihood is averaged.
        kl: "analytic", which falls back to samples where there is no closed form (a mixture prior),
            or "monte_carlo": mean_k ln q(z_k | x) - ln p(z_k).

    Raises:
        TypeError: `penalty` is none, such as a number, or `samples` is no whole number.
        ValueError: `samples` below 1, or an unknown `kl`.
    """

    penalty: Penalty = dataclasses.field(default_factory=Beta)
    samples: int = 1
    kl: str = "analytic"

    def __post_init__(self) -> None:
        if not callable(self.penalty):
            raise TypeError(
                f"penalty is {self.penalty!r}; want a penalty, such as fastvae.Beta({self.penalty})"
            )
        self.samples = whole("samples", self.samples, 1)
        if self.kl not in ("analytic", "monte_carlo"):
            raise ValueError(f"kl is {self.kl!r}; want 'analytic' or 'monte_carlo'")

    def __call__(
        self,
        model: VAE,
        x: Tensor,
        condition: Any = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> VAEOutput:
        noise: dict[str, Any] = {"seed": seed, "generator": generator}
        q = model.encode(x, condition)
        elementwise, exact = self.penalty.elementwise, self.kl == "analytic"
        if self.samples == 1 and exact and not elementwise:  # one fused op
            z, kl = model.prior.rsample_kl(q, condition, **noise)
            decoded = model.decode(z, condition)
            log_likelihood = model.log_prob(x, decoded, condition)
            return self._output(z, decoded, log_likelihood, kl)

        closed = model.prior.kl(q, condition, elementwise=elementwise) if exact else None
        if closed is not None:
            z = q.rsample((self.samples,), **noise)
            decoded = model.decode(z, condition, sample_ndim=1)
            log_likelihood = model.log_prob(x, decoded, condition)
            kl = closed
        elif elementwise:
            raise ValueError(
                f"penalty is a {type(self.penalty).__name__}, which needs the KL of each latent "
                "dimension; want kl='analytic' and a diagonal Gaussian posterior and prior"
            )
        else:
            weights = log_weights(model, x, self.samples, condition, q=q, **noise)
            z, decoded, log_likelihood = weights[:3]
            kl = -weights.log_ratio.mean(0)
        if self.samples == 1:
            z, decoded = z[0], decoded[0]
        return self._output(z, decoded, log_likelihood.mean(0), kl)

    def _output(self, z: Tensor, decoded: Tensor, log_likelihood: Tensor, kl: Tensor) -> VAEOutput:
        loss = self.penalty(kl) - log_likelihood.mean()
        if self.penalty.elementwise:
            kl = kl.flatten(1).sum(1)
        return VAEOutput(loss, log_likelihood - kl, log_likelihood, kl, z, decoded)


class _Weighted:
    """A loss that is a bound on ln p(x) made of the log-weights of K samples."""

    samples: int
    path_derivative: ClassVar[bool] = False

    def bound(self, weights: LogWeights) -> Tensor:
        """One value an example."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        self.samples = whole("samples", self.samples, 1)

    def __call__(
        self,
        model: VAE,
        x: Tensor,
        condition: Any = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> VAEOutput:
        weights = log_weights(
            model,
            x,
            self.samples,
            condition,
            path_derivative=self.path_derivative,
            seed=seed,
            generator=generator,
        )
        bound = self.bound(weights)
        log_likelihood, kl = weights.log_likelihood.mean(0), -weights.log_ratio.mean(0)
        return VAEOutput(-bound.mean(), bound, log_likelihood, kl, weights.z, weights.decoded)


@dataclasses.dataclass
class StickingTheLanding(_Weighted):
    """mean_k ln w_k, with the parameters phi of q constant inside ln q(z | x; phi).

    Its value is that of the Monte Carlo ELBO. Its gradient by phi is the path derivative
    mean_k (d ln w_k / dz_k) (dz_k / dphi) alone: the score term, whose mean is 0, is left out, and
    so is its variance, which is all of the variance where q is the exact posterior (Roeder, Wu &
    Duvenaud 2017, "Sticking the landing").

    Args:
        samples: K.

    Raises:
        ValueError: `samples` below 1.
    """

    samples: int = 1

    path_derivative: ClassVar[bool] = True

    def bound(self, weights: LogWeights) -> Tensor:
        return weights.total.mean(0)


@dataclasses.dataclass
class IWAE(_Weighted):
    """ln 1/K sum_k w_k, a bound that rises with K towards ln p(x) (Burda, Grosse & Salakhutdinov
    2016, "Importance weighted autoencoders").

    Its gradient is sum_k v_k d ln w_k, v = softmax(ln w). With K = 1 it is the ELBO with
    its KL by Monte Carlo.

    Args:
        samples: K.

    Raises:
        ValueError: `samples` below 1.
    """

    samples: int = 50

    def bound(self, weights: LogWeights) -> Tensor:
        return log_mean_exp(weights.total)


@dataclasses.dataclass
class DReG(_Weighted):
    """The IWAE bound, with the encoder's gradient doubly reparameterized (Tucker, Lawson, Gu &
    Maddison 2019, "Doubly reparameterized gradient estimators for Monte Carlo objectives"):

        sum_k v_k^2 (d ln w_k / dz_k) (dz_k / dphi),    v = softmax(ln w)

    an unbiased estimate of what IWAE's own estimates, whose signal-to-noise ratio does not fall as
    K rises. The decoder and the prior have IWAE's gradient.

    Args:
        samples: K.

    Raises:
        ValueError: `samples` below 1.
    """

    samples: int = 50

    path_derivative: ClassVar[bool] = True

    def bound(self, weights: LogWeights) -> Tensor:
        # The bound's own gradient brings one factor v on its way to q; q is owed a second.
        v = torch.softmax(weights.total.detach(), 0)
        for t in weights.through:
            if t.requires_grad:
                factor = v.reshape(*v.shape, *(1,) * (t.dim() - 2)).to(t.dtype)
                t.register_hook(functools.partial(torch.mul, factor))
        return log_mean_exp(weights.total)
