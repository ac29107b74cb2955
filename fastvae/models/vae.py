"""`VAE`: an encoder, a decoder, and what makes a latent-variable model of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.arguments import as_shape, check_param
from ..ops.bounds import Bound
from ..ops.forms import scale_form
from . import importance, information
from .conditions import of_each_example
from .distributions import DiagonalGaussian
from .importance import LogLikelihood
from .likelihoods import Gaussian, Likelihood
from .objectives import ELBO, Objective, VAEOutput
from .priors import Posterior, Prior, StandardNormal

__all__ = ["VAE", "VAEOutput"]


class VAE(nn.Module):
    """A variational autoencoder (Kingma & Welling 2014, "Auto-Encoding Variational Bayes").

    With (mu, ln sigma_q^2) = encoder(x) and f = decoder, by default

        q(z | x) = N(mu, diag(sigma_q^2)),   p(z) = N(0, I),   p(x | z) = N(f(z), I)

    and the loss of one example is minus the ELBO, KL(q(z | x) || p(z)) - ln p(x | z), in nats.

    Args:
        encoder: any module from x, [B, ...], to one tensor whose halves along `dim` are mu and
            ln sigma_q^2.
        decoder: any module from z, of the shape of mu, to the parameters of p(x | z): a tensor of
            x's shape, or `likelihood.outputs` times as long in dimension 1.
        latent_shape: shape of one example's z, or its only size. Needed to sample from the prior,
            and checked against the encoder where given.
        likelihood: p(x | z); default `Gaussian(sigma=1.0)`.
        prior: p(z); default `StandardNormal()`.
        objective: what `forward` computes; default `ELBO()`. A plain attribute, as its fields are.
        dim: the dimension of the encoder's output that holds the two halves.
        param: what the second half is: "logvar", "log_std", "std", "var" or "softplus".
        min_std: added to sigma_q.
        bound: of the encoder's ln sigma_q^2 (with `param="logvar"`).
        posterior: from the encoder's output to q(z | x), in place of the two halves; such as
            `CholeskyGaussian.from_params` for a full covariance.

    Where a `condition` is given to a method, encoder, decoder and prior are called with it as their
    second argument: conditional models are a matter of the user's modules.

    Raises:
        ValueError: `latent_shape` out of range, an unknown `param`, or a `bound` of anything else
            than a log-variance.

    Example:
        >>> model = VAE(nn.Linear(784, 2 * 16), nn.Linear(16, 784), latent_shape=16,
        ...             likelihood=fastvae.Bernoulli(), objective=fastvae.IWAE(samples=5))
        >>> model(x).loss.backward()
        >>> images = model.sample(64)
    """

    min_std = 0.0  # of models that were saved before there was one

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent_shape: int | Sequence[int] | None = None,
        likelihood: Likelihood | None = None,
        prior: Prior | None = None,
        objective: Objective | None = None,
        dim: int = 1,
        param: str = "logvar",
        min_std: float = 0.0,
        bound: Bound | None = None,
        posterior: Callable[[Tensor], Posterior] | None = None,
    ) -> None:
        super().__init__()
        check_param(scale_form(param, bound, min_std)[0])
        if bound is not None and (param != "logvar" or posterior is not None):
            raise ValueError("bound is given; want param='logvar' and no posterior with it")
        if latent_shape is not None:
            latent_shape = as_shape("latent_shape", latent_shape)
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = None if latent_shape is None else torch.Size(latent_shape)
        self.likelihood = Gaussian() if likelihood is None else likelihood
        self.prior = StandardNormal() if prior is None else prior
        self.objective: Objective = ELBO() if objective is None else objective
        self.dim = dim
        self.param = param
        self.min_std = min_std
        self.bound = bound
        self.posterior = posterior

    # ---- The model -------------------------------------------------------------------------------

    def encode(self, x: Tensor, condition: Any = None) -> Posterior:
        """q(z | x); its `batch_shape` is [B] and its `event_shape` that of one example's z.

        Raises:
            TypeError: the encoder returned something other than one floating-point tensor.
            ValueError: that tensor does not split into halves, or not into ones of `latent_shape`.
        """
        params = self.encoder(x) if condition is None else self.encoder(x, condition)
        if not isinstance(params, Tensor):
            raise TypeError(
                f"encoder returned a {type(params).__name__}; want one tensor with mu and the "
                f"scale as its halves, such as torch.cat([mu, logvar], dim={self.dim})"
            )
        q: Posterior
        if self.posterior is not None:
            q = self.posterior(params)
        else:
            q = DiagonalGaussian.from_params(
                params, self.dim, param=self.param, min_std=self.min_std, bound=self.bound
            )
        if self.latent_shape is not None and q.event_shape != self.latent_shape:
            raise ValueError(
                f"encoder returned shape {list(params.shape)}, a latent_shape of "
                f"{list(q.event_shape)}; want {list(self.latent_shape)}"
            )
        return q

    def decode(self, z: Tensor, condition: Any = None, *, sample_ndim: int = 0) -> Tensor:
        """f(z), the parameters of p(x | z): with a Gaussian likelihood its mean.

        Args:
            z: [B, *latent_shape], with `sample_ndim` more dimensions in front, which the decoder
                does not see: it gets one long batch.
            condition: the decoder's second argument, [B, ...], or a dictionary, list or tuple of
                such; what has one row is shared by all examples.

        Raises:
            ValueError: with `sample_ndim`, a tensor of the condition has another number of rows.
        """
        if sample_ndim == 0:
            return self.decoder(z) if condition is None else self.decoder(z, condition)
        shape = z.shape[: sample_ndim + 1]
        flat = z.flatten(0, sample_ndim)
        condition = of_each_example(
            condition, shape[-1], lambda t: t.expand(*shape, *t.shape[1:]).flatten(0, sample_ndim)
        )
        return self.decode(flat, condition).unflatten(0, shape)

    def log_prob(self, x: Tensor, decoded: Tensor, condition: Any = None) -> Tensor:
        """ln p(x | z) in nats, [B] or [..., B], from the decoder's output."""
        context = self.likelihood.context(condition, x)
        return self.likelihood.log_prob(x, decoded, **context)

    def forward(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> VAEOutput:
        """The objective's loss of a batch, its parts for each example, and what was computed on the
        way.

        Args:
            x: [B, ...], floating-point.
            seed, generator: where z's noise comes from, as in `fastvae.rsample_kl`.

        Raises:
            TypeError, ValueError: as `encode`.
            ValueError: the decoder's output does not have the shape that the likelihood wants.
        """
        return self.objective(self, x, condition, seed=seed, generator=generator)

    # ---- What it makes ---------------------------------------------------------------------------

    def reconstruct(self, x: Tensor, condition: Any = None) -> Tensor:
        """E[x | z] at the mode of q(z | x): x without noise."""
        mode = self.encode(x, condition).mode
        context = self.likelihood.context(condition, x)
        return self.likelihood.mean(self.decode(mode, condition), **context)

    def sample_latent(
        self,
        n: int = 1,
        condition: Any = None,
        *,
        temperature: float = 1.0,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n draws of z from the prior, [n, *latent_shape].

        Raises:
            ValueError: the model was made without `latent_shape`.
        """
        if self.latent_shape is None:
            raise ValueError(
                "latent_shape is None; want the shape of one z, as in VAE(..., latent_shape=16)"
            )
        like = next(self.decoder.parameters(), torch.empty(0))  # for its dtype and device
        return self.prior.sample(
            like.new_zeros((n, *self.latent_shape)),
            condition,
            temperature=temperature,
            seed=seed,
            generator=generator,
        )

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        condition: Any = None,
        *,
        temperature: float = 1.0,
        noise: bool = False,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """New data for n draws of z from the prior, without gradients: [n, ...].

        Args:
            temperature: factor of the prior's standard deviation; below 1, fewer but likelier z.
            noise: draw x ~ p(x | z), instead of giving E[x | z].
            seed, generator: as in `fastvae.rsample`. From one seed, more samples never change the
                first ones.

        Raises:
            ValueError: the model was made without `latent_shape`.
        """
        z = self.sample_latent(
            n, condition, temperature=temperature, seed=seed, generator=generator
        )
        decoded = self.decode(z, condition)
        context = self.likelihood.context(condition)
        if not noise:
            return self.likelihood.mean(decoded, **context)
        if seed is not None:
            seed = ~seed  # another stream than z's
        return self.likelihood.sample(decoded, seed=seed, generator=generator, **context)

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, other: Tensor, steps: int = 8, condition: Any = None
    ) -> Tensor:
        """E[x | z] along the straight lines between the modes of q(z | x) and q(z | other), ends
        included, without gradients: [steps, B, ...] for two batches [B, ...], of one condition.

        Raises:
            ValueError: `steps` below 2.
        """
        if steps < 2:
            raise ValueError(f"steps is {steps}; want at least 2")
        start, end = self.encode(x, condition).mode, self.encode(other, condition).mode
        t = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)
        z = torch.lerp(start, end, t.reshape(-1, *(1,) * start.dim()))
        decoded = self.decode(z, condition, sample_ndim=1)
        context = self.likelihood.context(condition)
        each = [self.likelihood.mean(of_step, **context) for of_step in decoded]
        return torch.stack(each)

    # ---- What it is worth ------------------------------------------------------------------------

    def log_likelihood(
        self,
        x: Tensor,
        n_samples: int = 1000,
        condition: Any = None,
        *,
        chunk: int = 16,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> LogLikelihood:
        """ln p(x) by importance sampling from q(z | x), with standard error and effective sample
        size; see `fastvae.importance_sampling`."""
        return importance.importance_sampling(
            self, x, n_samples, condition, chunk=chunk, seed=seed, generator=generator
        )

    def report(self, x: Tensor, **options: Any) -> information.Report:
        """Rate, distortion, active units and more of data x; see `fastvae.report`."""
        return information.report(self, x, **options)

    def extra_repr(self) -> str:
        shape = None if self.latent_shape is None else tuple(self.latent_shape)
        return f"latent_shape={shape}, objective={self.objective}"
