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
from torch.nn import functional as F

import fastvae
from fastvae import DiagonalGaussian

from .cases import Case
from .formulas import Distributions, Formulas, Library
from .inputs import Inputs

__all__ = [
    "FLOOR",
    "FUSED",
    "IDIOM",
    "IDIOMS",
    "LIMIT",
    "PEERS",
    "TITLES",
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
    if peer == "distributions" and case.op.function.startswith(("zero_inflated", "aggregate")):
        return "torch.distributions has none"
    if peer == "distributions" and case.op.function.startswith(
        ("mixture", "multinomial", "colour")
    ):
        return "that of torch.distributions is another"
    if peer == "distributions" and case.op.function.startswith("continuous_bernoulli"):
        return "that of torch.distributions is off by more than the check allows"
    loses = case.op.data in ("grey", "counts") or case.op.compares
    if peer != FUSED and case.dtype.itemsize == 2 and loses:
        return "in a half type its formula keeps no digits"
    if peer != FUSED and case.dtype.itemsize == 2 and "free_nats" in case.op.options:
        return "in a half type its formula puts other rows below the free nats"
    if peer != FUSED and case.dtype == torch.float64 and "negative_binomial" in case.op.name:
        return "its epsilon is visible in float64"
    if peer == "jax" and case.op.function == "straight_through_categorical":
        return "its noise is of another kind"
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
    function = getattr(library, case.op.method)
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


def _by_matrix_products(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    precision = torch.exp(-logvar)
    squares = (z * z) @ precision.T - 2 * z @ (mu * precision).T + (mu * mu * precision).sum(1)
    constant = logvar.sum(1) + mu.shape[1] * math.log(2 * math.pi)
    return torch.logsumexp(log_weights - 0.5 * (squares + constant), 1)


# By the name of the op: how it is known, and its function.
IDIOMS: dict[str, tuple[str, Function]] = {
    "rsample": ("mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)", _rsample),
    "kl_divergence": ("-0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)", _kl),
    "rsample_kl": ("both of these", _rsample_kl),
    "mixture_log_prob:500": ("the square by matrix products", _by_matrix_products),
    "mixture_log_prob:1000": ("the square by matrix products", _by_matrix_products),
    "multinomial_log_prob": (
        "(x * F.log_softmax(logits, -1)).sum(-1)",
        lambda x, logits: (x * F.log_softmax(logits, -1)).sum(-1),
    ),
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


# ---- fastvae -------------------------------------------------------------------------------------


def _fused(case: Case) -> Function:
    """As README recommends it; where the encoder's output is in halves, as one packed tensor."""
    op = case.op
    function = getattr(fastvae, op.function)
    if "weight" in op.inputs:
        return lambda x, weight, *others: function(x, *others, weight=weight)
    samples = {"sample_shape": op.samples} if op.samples else {}
    if not case.shape.halves:
        return partial(function, **op.options, **samples) if op.options or samples else function
    method = {"kl_divergence": "kl"}.get(op.function, op.function)
    if not hasattr(DiagonalGaussian, method):
        return lambda q, p: function(*q.chunk(2, dim=1), *p.chunk(2, dim=1))

    def gaussian(params: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.from_params(params, **op.options)

    def packed(q: Tensor, *p: Tensor) -> Any:
        return getattr(gaussian(q), method)(*map(gaussian, p), **samples)

    return packed
