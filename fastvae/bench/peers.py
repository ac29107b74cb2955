"""What computes a case: fastvae, and what a user might pick instead.

- eager: the formulas as they stand in many a VAE, in PyTorch;
- compile: `torch.compile` of these, for one fixed shape;
- distributions: `torch.distributions`: Independent(Normal), rsample, kl_divergence, log_prob;
- jax: the same formulas under `jax.jit`, gradients by `jax.vjp` (jax_peer.py);
- idiom: the fastest thing that PyTorch has to be written in the op's place, which may be less than
  the op: `F.mse_loss` has no sigma;
- floor: a graph of two ATen ops that could not do less with the same tensors;
- copy: `Tensor.copy_` of half as many bytes as the case must move, which reads and writes them: the
  limit that memory, and the call of one op, set.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    ContinuousBernoulli,
    Independent,
    Laplace,
    NegativeBinomial,
    Normal,
    Poisson,
    kl_divergence,
)
from torch.nn import functional as F

import fastvae
from fastvae import DiagonalGaussian

from .cases import SAMPLES, Case
from .inputs import SIGMA, Inputs

__all__ = [
    "FLOOR",
    "FUSED",
    "IDIOM",
    "IDIOMS",
    "LIMIT",
    "PEERS",
    "TITLES",
    "Formulas",
    "Library",
    "Program",
    "TorchProgram",
    "compiled",
    "function_of",
    "make_program",
    "stands_in",
    "unavailable",
]

FUSED, LIMIT, IDIOM, FLOOR = "fastvae", "copy", "idiom", "floor"
PEERS = ("eager", "compile", "distributions", "jax", IDIOM, FLOOR)
TITLES = {
    "compile": "torch.compile",
    "distributions": "torch.distributions",
    "jax": "JAX jit",
    FLOOR: "two ATen ops",
}

Function = Callable[..., Any]

_EPS = 1e-8  # scvi-tools'


class Program:
    """A case as one library computes it, over sets of inputs, of which k is the number."""

    name: str

    def forward(self, k: int) -> Any:
        """The outputs."""
        raise NotImplementedError

    def record(self, k: int) -> Any:
        """What `backward` needs: the outputs and what was saved."""
        return self.forward(k)

    def backward(self, k: int, recorded: Any) -> Any:
        """The gradients."""
        raise NotImplementedError

    def both(self, k: int) -> Any:
        """Forward and backward."""
        return self.backward(k, self.record(k))

    def results(self, direction: str) -> tuple[list[Tensor], list[Tensor] | None]:
        """Outputs and gradients of set 0, call after call, by the very functions that are timed."""
        raise NotImplementedError


class TorchProgram(Program):
    """A function of tensors, differentiated by autograd."""

    def __init__(self, name: str, function: Function, inputs: Inputs) -> None:
        self.name = name
        self.function = function
        self.leaves = [[level.leaves for level in levels] for levels in inputs.sets]
        self.wanted = [[t for level in levels for t in level.wanted] for levels in inputs.sets]
        self.upstream = [
            [g for level in levels for g in level.upstream] or None for levels in inputs.sets
        ]

    def forward(self, k: int) -> Any:
        function = self.function
        calls = self.leaves[k]
        if len(calls) == 1:
            return function(*calls[0])
        results = [function(*leaves) for leaves in calls]
        return [y for ys in results for y in (ys if isinstance(ys, tuple) else (ys,))]

    def backward(self, k: int, recorded: Any) -> Any:
        return torch.autograd.grad(recorded, self.wanted[k], self.upstream[k])

    def both(self, k: int) -> Any:
        return torch.autograd.grad(self.forward(k), self.wanted[k], self.upstream[k])

    def results(self, direction: str) -> tuple[list[Tensor], list[Tensor] | None]:
        y = self.forward(0)
        grads = None if direction == "forward" else list(self.backward(0, y))
        return [y] if isinstance(y, Tensor) else list(y), grads


class Copy(Program):
    """The limit: as many bytes as the case moves, half of them read and half of them written."""

    name = LIMIT

    def __init__(self, case: Case, sets: int) -> None:
        share = case.bytes / case.elements / (2 * torch.float32.itemsize)
        sizes = [max(1, round(share * math.prod(size))) for size in case.shape.sizes]

        def buffers() -> list[Tensor]:
            return [torch.rand(n, device=case.device) for n in sizes]

        self.pairs = [list(zip(buffers(), buffers(), strict=True)) for _ in range(sets)]

    def both(self, k: int) -> None:
        for target, source in self.pairs[k]:
            target.copy_(source)

    forward = both

    def backward(self, k: int, recorded: Any) -> None:
        self.both(k)


def unavailable(peer: str, case: Case) -> str:
    """Why a peer cannot compute a case, or ""."""
    if peer == IDIOM and (case.op.name not in IDIOMS or case.shape.halves):
        return "there is none"
    if peer == FLOOR and (case.op.name != "rsample_kl" or case.shape.halves):
        return "there is none"
    if peer == "distributions" and case.op.function.startswith("discretized_logistic"):
        return "torch.distributions has none"
    if peer == "distributions" and case.op.function.startswith("zero_inflated"):
        return "torch.distributions has none"
    if peer == "distributions" and case.op.function.startswith("continuous_bernoulli"):
        return "that of torch.distributions is off by more than the check allows"
    if peer != FUSED and case.dtype.itemsize == 2 and case.op.data in ("grey", "counts"):
        return "in a half type its formula keeps no digits"
    if peer != FUSED and case.dtype == torch.float64 and "negative_binomial" in case.op.name:
        return "its epsilon is visible in float64"
    if peer == "jax":
        if importlib.util.find_spec("jax") is None:
            return "JAX is not installed"
        if case.device != "cpu":
            return "JAX keeps another stream of the GPU"
        if case.dtype == torch.float64:
            return "JAX computes float64 only where a whole process does"
    return ""


def make_program(peer: str, case: Case, inputs: Inputs) -> Program:
    """The program of fastvae ("fastvae"), the limit ("copy") or a peer."""
    if peer == LIMIT:
        return Copy(case, len(inputs.sets))
    if peer == FUSED:
        return TorchProgram(peer, _fused(case), inputs)
    if peer == "jax":
        from .jax_peer import JaxProgram  # only here: it may not be installed

        return JaxProgram(case, inputs)
    if peer == "distributions":
        return TorchProgram(peer, function_of(Distributions(), case), inputs)
    if (stand_in := stands_in(peer, case)) is not None:
        return TorchProgram(peer, stand_in, inputs)
    eager = function_of(Formulas(torch, torch.randn_like), case)
    if peer == "eager":
        return TorchProgram(peer, eager, inputs)
    if peer == "compile":
        return TorchProgram(peer, compiled(eager), inputs)
    raise ValueError(f"peer is {peer!r}; want one of {', '.join((FUSED, LIMIT, *PEERS))}")


def compiled(function: Function) -> Function:
    """`function`, compiled for one shape; nothing compiled before is used after."""
    from torch._inductor import config  # only here: it takes a second

    config.compile_threads = 1  # else workers start, which compute while others are timed
    torch._dynamo.reset()  # one code object serves all cases, and dynamo counts its shapes
    return torch.compile(function, dynamic=False, fullgraph=True)


def function_of(library: Library, case: Case) -> Function:
    """A case's op as a function of one call's leaves."""
    function = getattr(library, case.op.function)
    if not case.shape.halves:
        return function
    if len(case.op.inputs) == 2:
        return lambda q: function(*q.chunk(2, dim=1))
    return lambda q, p: function(*q.chunk(2, dim=1), *p.chunk(2, dim=1))


# ---- In an op's place ----------------------------------------------------------------------------


def _rsample(mu: Tensor, logvar: Tensor) -> Tensor:  # Normal(...).rsample() takes longer
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).flatten(1).sum(1)


def _rsample_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return _rsample(mu, logvar), _kl(mu, logvar)


def _two_ops(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return mu + logvar, (mu * logvar).flatten(1).sum(1)


def _gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return F.gaussian_nll_loss(mean, x, logvar.exp(), reduction="sum")


# By the name of the op: how it is known, and its function.
IDIOMS: dict[str, tuple[str, Function]] = {
    "rsample": ("mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)", _rsample),
    "kl_divergence": ("-0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)", _kl),
    "rsample_kl": ("both of these", _rsample_kl),
    "gaussian_nll_loss:sigma": (
        "F.mse_loss(reduction='sum')",
        lambda x, mean: F.mse_loss(mean, x, reduction="sum"),
    ),
    "gaussian_nll_loss:elementwise": ("F.gaussian_nll_loss(reduction='sum')", _gaussian_nll),
    "bernoulli_nll_loss": (
        "F.binary_cross_entropy_with_logits(reduction='sum')",
        lambda x, logits: F.binary_cross_entropy_with_logits(logits, x, reduction="sum"),
    ),
    "poisson_nll_loss": (
        "F.poisson_nll_loss(log_input=False, reduction='sum')",
        lambda x, mean: F.poisson_nll_loss(mean, x, log_input=False, reduction="sum"),
    ),
    "laplace_nll_loss:fixed": (
        "F.l1_loss(reduction='sum')",
        lambda x, mean: F.l1_loss(mean, x, reduction="sum"),
    ),
}


def stands_in(peer: str, case: Case) -> Function | None:
    """The function of a peer that is not the op itself."""
    if peer == FLOOR:
        return _two_ops
    return IDIOMS[case.op.name][1] if peer == IDIOM else None


# ---- As users write it ---------------------------------------------------------------------------


class Library:
    """The public functions, by name, as another library has them."""

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_nll_loss"):
            raise AttributeError(name)
        log_prob = getattr(self, name.replace("nll_loss", "log_prob"))
        return lambda *tensors: -log_prob(*tensors).mean()


class Formulas(Library):
    """In `lib`, which is torch or jax.numpy: they share the functions used here."""

    def __init__(self, lib: Any, normal_like: Function) -> None:
        self.lib = lib
        self.normal_like = normal_like

    def rsample(self, mu: Any, logvar: Any) -> Any:
        std = self.lib.exp(0.5 * logvar)
        return mu + std * self.normal_like(std)

    def kl_divergence(self, mu: Any, logvar: Any, *prior: Any) -> Any:
        exp = self.lib.exp
        if not prior:
            return -0.5 * _rows(1 + logvar - mu**2 - exp(logvar))
        prior_mu, prior_logvar = prior
        ratio = (exp(logvar) + (mu - prior_mu) ** 2) / exp(prior_logvar)
        return 0.5 * _rows(prior_logvar - logvar - 1 + ratio)

    def rsample_kl(self, mu: Any, logvar: Any, *prior: Any) -> Any:
        return self.rsample(mu, logvar), self.kl_divergence(mu, logvar, *prior)

    def rsample_log_ratio(self, mu: Any, logvar: Any) -> Any:
        std = self.lib.exp(0.5 * logvar)
        eps = self.normal_like(self.lib.broadcast_to(std, (SAMPLES, *std.shape)))
        z = mu + std * eps
        log_2pi = math.log(2 * math.pi)
        log_p = -0.5 * _rows(log_2pi + z**2, 2)
        log_q = -0.5 * _rows(log_2pi + logvar + (z - mu) ** 2 / self.lib.exp(logvar), 2)
        return z, log_p - log_q

    def gaussian_log_prob(self, x: Any, mean: Any, logvar: Any = None) -> Any:
        if logvar is None:
            constant = math.log(SIGMA) + 0.5 * math.log(2 * math.pi)
            return _rows(-0.5 * ((x - mean) / SIGMA) ** 2 - constant)
        squares = (x - mean) ** 2 / self.lib.exp(logvar)
        return -0.5 * _rows(math.log(2 * math.pi) + logvar + squares)

    def bernoulli_log_prob(self, x: Any, logits: Any) -> Any:
        return _rows(self._bernoulli(x, logits))

    def continuous_bernoulli_log_prob(self, x: Any, logits: Any) -> Any:
        near = abs(logits) < 0.02
        safe = self.lib.where(near, 1.0, logits)
        far = self.lib.log(safe / self.lib.tanh(0.5 * safe))
        series = math.log(2) + logits**2 / 12 - 7 * logits**4 / 1440
        normalizer = self.lib.where(near, series, far)
        return _rows(self._bernoulli(x, logits) + normalizer)

    def laplace_log_prob(self, x: Any, mean: Any, log_scale: Any = None) -> Any:
        if log_scale is None:
            return _rows(-abs(x - mean) - math.log(2))
        return _rows(-abs(x - mean) / self.lib.exp(log_scale) - log_scale - math.log(2))

    def discretized_logistic_log_prob(self, x: Any, mean: Any, log_scale: Any) -> Any:
        half, precision, where = 1 / 510, self.lib.exp(-log_scale), self.lib.where
        first = -self._softplus((mean - x - half) * precision)
        last = -self._softplus((x - mean - half) * precision)
        inside = first + last + self.lib.log(-self.lib.expm1(-2 * half * precision))
        return _rows(where(x < half, first, where(x > 1 - half, last, inside)))

    # Counts as scvi-tools 1.4 writes them, term by term.

    def poisson_log_prob(self, x: Any, mean: Any) -> Any:
        return _rows(x * self.lib.log(mean) - mean - self._lgamma(x + 1))

    def negative_binomial_log_prob(self, x: Any, mean: Any, theta: Any) -> Any:
        log, eps = self.lib.log, _EPS
        odds = log(theta + mean + eps)
        value = theta * (log(theta + eps) - odds) + x * (log(mean + eps) - odds)
        return _rows(value + self._gammas(x, theta))

    def zero_inflated_negative_binomial_log_prob(
        self, x: Any, mean: Any, theta: Any, zero_logits: Any
    ) -> Any:
        log, eps = self.lib.log, _EPS
        softplus = self._softplus(-zero_logits)
        odds = log(theta + mean + eps)
        at_0 = theta * (log(theta + eps) - odds) - zero_logits
        zero = self._softplus(at_0) - softplus
        above = at_0 - softplus + x * (log(mean + eps) - odds) + self._gammas(x, theta)
        return _rows(self._mask(x < eps, x) * zero + self._mask(x > eps, x) * above)

    def _mask(self, condition: Any, like: Any) -> Any:
        return condition.type_as(like) if self.lib is torch else condition.astype(like.dtype)

    def _gammas(self, x: Any, theta: Any) -> Any:
        return self._lgamma(x + theta) - self._lgamma(theta) - self._lgamma(x + 1)

    # PyTorch has functions for these.

    def _lgamma(self, t: Any) -> Any:
        if self.lib is torch:
            return torch.lgamma(t)
        from jax.scipy.special import gammaln

        return gammaln(t)

    def _bernoulli(self, x: Any, logits: Any) -> Any:
        if self.lib is torch:
            return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return x * logits - self._softplus(logits)

    def _softplus(self, t: Any) -> Any:
        return F.softplus(t) if self.lib is torch else self.lib.logaddexp(t, 0.0)


def _rows(t: Any, dims: int = 1) -> Any:
    return t.reshape(*t.shape[:dims], -1).sum(-1)


class Distributions(Library):
    """In torch.distributions, with its own checks of arguments, as they are by default."""

    def rsample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return _gaussian(mu, logvar).rsample()

    def kl_divergence(self, mu: Tensor, logvar: Tensor, *prior: Tensor) -> Tensor:
        return kl_divergence(_gaussian(mu, logvar), _prior(mu, *prior))

    def rsample_kl(self, mu: Tensor, logvar: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        q = _gaussian(mu, logvar)
        return q.rsample(), kl_divergence(q, _prior(mu, *prior))

    def rsample_log_ratio(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        q = _gaussian(mu, logvar)
        z = q.rsample((SAMPLES,))
        return z, _prior(mu).log_prob(z) - q.log_prob(z)

    def gaussian_log_prob(self, x: Tensor, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
        scale = SIGMA if logvar is None else torch.exp(0.5 * logvar)
        return Independent(Normal(mean, scale), mean.dim() - 1).log_prob(x)

    def bernoulli_log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        return Independent(Bernoulli(logits=logits), x.dim() - 1).log_prob(x)

    def continuous_bernoulli_log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        return Independent(ContinuousBernoulli(logits=logits), x.dim() - 1).log_prob(x)

    def laplace_log_prob(self, x: Tensor, mean: Tensor, log_scale: Tensor | None = None) -> Tensor:
        scale = 1.0 if log_scale is None else torch.exp(log_scale)
        return Independent(Laplace(mean, scale), x.dim() - 1).log_prob(x)

    def poisson_log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        return Independent(Poisson(mean), x.dim() - 1).log_prob(x)

    def negative_binomial_log_prob(self, x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
        logits = torch.log(mean) - torch.log(theta)
        return Independent(NegativeBinomial(theta, logits=logits), x.dim() - 1).log_prob(x)


def _gaussian(mu: Tensor, logvar: Tensor) -> Any:
    return Independent(Normal(mu, torch.exp(0.5 * logvar)), mu.dim() - 1)


def _prior(mu: Tensor, *prior: Tensor) -> Any:
    if prior:
        return _gaussian(*prior)
    return Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), mu.dim() - 1)


# ---- fastvae -------------------------------------------------------------------------------------


def _fused(case: Case) -> Function:
    """As README recommends it; where the encoder's output is in halves, as one packed tensor."""
    function = getattr(fastvae, case.op.function)
    if case.op.name.endswith(":sigma"):
        return lambda x, mean: function(x, mean, SIGMA, param="std")
    samples = {"sample_shape": case.op.samples} if case.op.samples else {}
    if not case.shape.halves:
        return partial(function, **samples) if samples else function
    method = {"kl_divergence": "kl"}.get(case.op.function, case.op.function)
    gaussian = DiagonalGaussian.from_params

    def packed(q: Tensor, *p: Tensor) -> Any:
        return getattr(gaussian(q), method)(*map(gaussian, p), **samples)

    return packed
