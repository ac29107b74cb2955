"""`DiagonalGaussian`: the encoder's distribution, over the fused ops."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints
from torch.overrides import has_torch_function_unary

from .. import ops
from ..ops.arguments import (
    TensorLike,
    check_bound,
    check_param,
    event_dims,
    tensor_arguments,
    weight_argument,
)
from ..ops.bounds import Bound, Raised
from ..ops.elements import computed_in, log_sigma, of_log_sigma, sigma
from ..ops.forms import scale_form
from ..ops.noise import Generators, Source, draw, make_seed
from ..ops.op import OPS

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DiagonalGaussian"]


class DiagonalGaussian(Distribution):
    """N(mu, diag(sigma^2)); the last `event_ndim` dimensions are one event, by default all but the
    first. Equivalent to `Independent(Normal(mu, sigma), event_ndim)`; its KL divergences are in
    `torch.distributions.kl_divergence` (see `fastvae.divergences`).

    Args:
        mu, logvar: tensors or numbers that broadcast against each other.
        param: what `logvar` is: "logvar", "log_std", "std", "var", or "softplus", of which sigma is
            ln(1 + e^s).
        min_std: added to sigma.
        bound: of `logvar`, with `param="logvar"`. The attribute `logvar` is what it leaves; of a
            softplus or with a `min_std` that is ln sigma, and `param` is "log_std".
        event_ndim: how many trailing dimensions are one event.
        validate_args: check the values given to `log_prob` (which waits for a GPU). Off by default.

    Raises:
        TypeError, ValueError: as `fastvae.rsample`.
    """

    arg_constraints = {}  # noqa: RUF012  values are not checked: negative scales give NaN
    has_rsample = True

    def __init__(
        self,
        mu: TensorLike,
        logvar: TensorLike,
        *,
        param: str = "logvar",
        min_std: float = 0.0,
        bound: Bound | Raised | None = None,
        event_ndim: int | None = None,
        validate_args: bool | None = False,
    ) -> None:
        (self.mu, self._given), shape = tensor_arguments(mu=mu, logvar=logvar)
        self._params: Tensor | None = None
        self._packed_dim = -1
        self._set_form(param, bound, min_std)
        self._set_shape(event_ndim, shape, validate_args)

    @classmethod
    def from_params(
        cls,
        params: Tensor,
        dim: int = 1,
        *,
        param: str = "logvar",
        min_std: float = 0.0,
        bound: Bound | Raised | None = None,
        event_ndim: int | None = None,
        validate_args: bool | None = False,
    ) -> DiagonalGaussian:
        """The Gaussian whose mu and logvar are the halves of `params` along `dim`.

        Equivalent to `DiagonalGaussian(*params.chunk(2, dim))`, but backward writes one packed
        gradient: no `cat`, no zeros.

        Raises:
            TypeError: `params` is no floating-point tensor.
            ValueError: it has no dimension `dim`, or that dimension's size is odd.
        """
        if isinstance(params, Tensor):
            (params,), _ = tensor_arguments(params=params)
        else:
            raise TypeError(f"params is a {type(params).__name__}; want a tensor")
        if not -params.dim() <= dim < params.dim():
            raise ValueError(f"dim is {dim}; want a dimension of params, which has {params.dim()}")
        if params.shape[dim] % 2:
            raise ValueError(
                f"params has shape {list(params.shape)}; want an even size along dimension {dim}, "
                "the halves being mu and logvar"
            )
        self = cls.__new__(cls)
        self._params = params
        self._packed_dim = dim % params.dim()
        shape = list(params.shape)
        shape[dim] //= 2
        self._set_form(param, bound, min_std)
        self._set_shape(event_ndim, torch.Size(shape), validate_args)
        return self

    def _set_form(self, param: str, bound: Bound | Raised | None, min_std: float = 0.0) -> None:
        param, bound = scale_form(param, bound, min_std)
        self.param, self.bound = param, bound
        self._code, self._numbers = check_param(param), check_bound(bound, param)

    def _set_shape(
        self, event_ndim: int | None, shape: torch.Size, validate_args: bool | None
    ) -> None:
        self.event_ndim = event_dims(event_ndim, len(shape))
        self._shape = shape
        split = len(shape) - self.event_ndim
        super().__init__(shape[:split], shape[split:], validate_args=validate_args)

    # The halves of packed parameters, and logvar within its bound, are made when they are asked for
    # and then kept. `_given` is what the ops take, with the bound, for logvar.
    def __getattr__(self, name: str) -> Tensor:
        params: Tensor | None = self.__dict__.get("_params")
        if name in ("mu", "_given") and params is not None:
            self.mu, self._given = params.chunk(2, self._packed_dim)
            return self.mu if name == "mu" else self._given
        if name == "logvar":
            self.logvar = self._given if self.bound is None else self.bound(self._given)
            return self.logvar
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _packed(
        self, prior: DiagonalGaussian | None = None
    ) -> tuple[Tensor, None, Tensor | None, None] | None:
        """q and p as the kernels read packed tensors in place; None where they cannot."""
        if self._params is None or not ops.has_kernels(self._params):
            return None
        if has_torch_function_unary(self._params):  # the public functions ask it first
            return None
        if prior is None:
            return self._params, None, None, None
        same = (
            prior._params is not None
            and prior.bound is None
            and prior._params.dtype == self._params.dtype
            and prior._params.device == self._params.device
            and (prior._shape, prior._packed_dim, prior.param)
            == (self._shape, self._packed_dim, self.param)
        )
        return (self._params, None, prior._params, None) if same else None

    # ---- Sampling and KL -----------------------------------------------------------------------

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Reparameterized samples of shape `sample_shape + batch_shape + event_shape`."""
        if not sample_shape and (packed := self._packed()):
            return OPS["rsample"].run(
                packed[:2],
                {
                    "seed": self._make_seed(seed, generator),
                    "param": self._code,
                    "packed_dim": self._packed_dim,
                    "sample_shape": (),
                    "bound": self._numbers,
                },
            )
        return ops.rsample(
            self.mu,
            self._given,
            param=self.param,
            bound=self.bound,
            sample_shape=sample_shape,
            seed=seed,
            generator=generator,
        )

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """As `rsample`, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed=seed, generator=generator)

    def rsample_with_eps(
        self,
        sample_shape: Sequence[int] = (),
        *,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rsample` and its noise: z = mu + sigma eps, and eps, which is constant for autograd and
        float32 for half types."""
        like = self.mu if self._params is None else self._params
        source = make_seed(seed, generator, like, self._shape)
        if not isinstance(source, Tensor):
            source = draw(like.device, source)
        zeros = computed_in(torch.zeros((), dtype=like.dtype, device=like.device))
        eps = ops.rsample(zeros.expand(self._shape), 0.0, sample_shape=sample_shape, seed=source)
        return self.rsample(sample_shape, seed=source), eps

    def kl(
        self, prior: DiagonalGaussian | None = None, *, weight: TensorLike | None = None
    ) -> Tensor:
        """KL(self || prior) in nats, of shape `batch_shape`; the prior is N(0, I) if None. `weight`
        is of each element, as in `fastvae.kl_divergence`."""
        self._check_prior(prior)
        if packed := self._packed(prior):
            return OPS["kl_divergence"].run(
                packed,
                {
                    "weight": weight_argument(weight, self._params, self._shape),
                    "param": self._code,
                    "packed_dim": self._packed_dim,
                    "event_ndim": self.event_ndim,
                    "bound": self._numbers,
                },
            )
        return ops.kl_divergence(
            self.mu,
            self._given,
            *self._prior_arguments(prior),
            param=self.param,
            bound=self.bound,
            event_ndim=self.event_ndim,
            weight=weight,
        )

    def rsample_kl(
        self,
        prior: DiagonalGaussian | None = None,
        *,
        weight: TensorLike | None = None,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rsample()` and `kl(prior, weight=weight)` in one pass."""
        self._check_prior(prior)
        if packed := self._packed(prior):
            return OPS["rsample_kl"].run(
                packed,
                {
                    "seed": self._make_seed(seed, generator),
                    "weight": weight_argument(weight, self._params, self._shape),
                    "param": self._code,
                    "packed_dim": self._packed_dim,
                    "event_ndim": self.event_ndim,
                    "bound": self._numbers,
                },
            )
        return ops.rsample_kl(
            self.mu,
            self._given,
            *self._prior_arguments(prior),
            param=self.param,
            bound=self.bound,
            event_ndim=self.event_ndim,
            weight=weight,
            seed=seed,
            generator=generator,
        )

    def rsample_log_ratio(
        self,
        prior: DiagonalGaussian | None = None,
        sample_shape: Sequence[int] = (),
        *,
        weight: TensorLike | None = None,
        path_derivative: bool = False,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rsample(sample_shape)` and ln p(z) - ln q(z) in one pass, p = N(0, I) if prior is None;
        see `fastvae.rsample_log_ratio`."""
        self._check_prior(prior)
        if not sample_shape and (packed := self._packed(prior)):
            return OPS["rsample_log_ratio"].run(
                packed,
                {
                    "seed": self._make_seed(seed, generator),
                    "weight": weight_argument(weight, self._params, self._shape),
                    "param": self._code,
                    "packed_dim": self._packed_dim,
                    "event_ndim": self.event_ndim,
                    "sample_shape": (),
                    "path_derivative": bool(path_derivative),
                    "bound": self._numbers,
                },
            )
        return ops.rsample_log_ratio(
            self.mu,
            self._given,
            *self._prior_arguments(prior),
            param=self.param,
            bound=self.bound,
            sample_shape=sample_shape,
            event_ndim=self.event_ndim,
            weight=weight,
            path_derivative=path_derivative,
            seed=seed,
            generator=generator,
        )

    def _make_seed(self, seed: Tensor | int | None, generator: Generators | None) -> Source:
        return make_seed(seed, generator, self._params, self._shape)

    def _check_prior(self, prior: DiagonalGaussian | None) -> None:
        if prior is None:
            return
        if not isinstance(prior, DiagonalGaussian):
            raise TypeError(f"prior is a {type(prior).__name__}; want a DiagonalGaussian or None")
        if prior.event_ndim != self.event_ndim:
            raise ValueError(
                f"prior has event_ndim {prior.event_ndim}; want this distribution's, "
                f"{self.event_ndim}"
            )

    def _prior_arguments(self, prior: DiagonalGaussian | None) -> tuple[Tensor, ...]:
        if prior is None:
            return ()
        if prior.param == self.param:
            return prior.mu, prior.logvar
        return prior.mu, _convert(prior.logvar, prior.param, self.param)

    def detach(self) -> Self:
        """The same distribution, constant for autograd."""
        new = copy.copy(self)
        tensors = {name: t.detach() for name, t in vars(self).items() if isinstance(t, Tensor)}
        vars(new).update(tensors)
        return new

    # ---- The rest of a distribution --------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """ln q(value) in nats, summed over the event."""
        if self._validate_args:
            self._validate_sample(value)
        return ops.gaussian_log_prob(
            value,
            self.mu,
            self._given,
            param=self.param,
            bound=self.bound,
            event_ndim=self.event_ndim,
        )

    def entropy(self) -> Tensor:
        """sum ln sigma + 1/2 ln(2 pi e), in nats."""
        h = log_sigma(self.logvar, self.param).expand(self._shape)
        dims = tuple(range(-self.event_ndim, 0))
        constant = 0.5 * math.log(2 * math.pi * math.e) * math.prod(self.event_shape)
        return (h.sum(dims) if dims else h) + constant

    @property
    def mean(self) -> Tensor:
        return self.mu.expand(self._shape)

    @property
    def mode(self) -> Tensor:
        return self.mean

    @property
    def stddev(self) -> Tensor:
        std = sigma(self.logvar, self.param)
        return std.to(self.logvar.dtype).expand(self._shape)

    @property
    def variance(self) -> Tensor:
        return self.stddev**2

    @property
    def loc(self) -> Tensor:
        return self.mean

    @property
    def scale(self) -> Tensor:
        return self.stddev

    @property
    def base_dist(self) -> Normal:
        """The Normal of each element, as `Independent` has it."""
        return Normal(self.mean, self.stddev, validate_args=False)

    @property
    def event_dim(self) -> int:
        return self.event_ndim

    def cdf(self, value: Tensor) -> Tensor:
        """Phi((value - mu) / sigma) of each element, whatever is an event."""
        return torch.special.ndtr((value - self.mean) / self.stddev)

    def icdf(self, value: Tensor) -> Tensor:
        """mu + sigma Phi^-1(value) of each element, the inverse of `cdf`."""
        return self.mean + self.stddev * torch.special.ndtri(value)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_ndim)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """The same distribution with its batch dimensions expanded.

        Raises:
            NotImplementedError: of a subclass that has an `__init__` of its own and no `expand`, as
                in `torch.distributions`.
        """
        new: Self = self._get_checked_instance(DiagonalGaussian, _instance)
        shape = torch.Size(batch_shape) + self.event_shape
        new.mu, new._given = self.mu.expand(shape), self._given.expand(shape)
        new._params, new._packed_dim = None, -1
        new._set_form(self.param, self.bound)
        new._set_shape(self.event_ndim, shape, self._validate_args)
        return new

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, param={self.param!r})"
        )


def _convert(s: Tensor, source: str, target: str) -> Tensor:
    """The second argument of a Gaussian, read by `source`, as `target` wants it."""
    return of_log_sigma(log_sigma(s, source), target).to(s.dtype)
