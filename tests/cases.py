"""The table that the tests of the ops are driven by: what is called, with which tensors, lying how.

accuracy.py says what a call should give, and how near it must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae

PARAMS = ("logvar", "log_std", "std", "var")
BOUNDED = {
    f"logvar, {kind} bound": fastvae.Bound(-0.5, 1.0, kind)
    for kind in ("hard", "soft", "straight_through")
}
FORMS = (*PARAMS, *BOUNDED)  # ways to read a second argument, which tests take as `param`
# How memory is walked depends on an element's size alone; tests/cuda_on_host has all four.
LAYOUT_DTYPES = (torch.float32, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = 20140423
SHAPES = ((), (1,), (5,), (1, 1), (3, 1), (1, 9), (4, 20), (2, 3, 5), (2, 4, 3, 5))

Shape = Sequence[int]


# ---- Ops -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """A way to call one of the public functions."""

    name: str
    function: str
    arguments: tuple[str, ...]  # the tensors, all differentiable
    options: dict[str, Any] = field(default_factory=dict)
    scale_shape: Callable[[Shape], Shape] = tuple  # of a scale, where it may be broadcast
    # Of ln sigma^2 around 0. Where sigma_p is small a log-ratio multiplies what two computations of
    # its noise differ by; `exact` knows by how much, tests that compare two computations do not.
    spread: float = 1.0
    weighted: bool = False  # by `weights`

    @property
    def draws(self) -> bool:
        return self.function.startswith("rsample")

    @property
    def sums(self) -> bool:
        return self.function != "rsample"

    @property
    def gaussian(self) -> bool:
        return "logvar" in (*self.arguments, *self.options)

    @property
    def counts(self) -> bool:
        return self.function.split("_log")[0].endswith(("poisson", "negative_binomial"))

    @property
    def forms(self) -> tuple[str, ...]:
        """How its scales, or its means, may be given."""
        if self.counts:
            return ("rate", "log_rate") if "rate" in self.arguments else ("mean", "log")
        return FORMS if self.gaussian else FORMS[:1]

    def argument(self, name: str, t: Tensor, param: str, *, zeros: bool = False) -> Tensor:
        """The argument of that name, from standard normals.

        Of counts all are around 1: the gradient by theta is a difference of what grows beyond.
        They are above 0, where there is a gradient by them, unless `zeros` are wanted.
        """
        if name.endswith("logvar"):
            return from_logvar(t, param)
        if not self.counts or name == "zero_logits":
            return t
        if name == "x":
            x = 0.5 + (t / 2).exp()
            return torch.where(t < -0.5, 0, x) if zeros else x
        return t / 2 if param.startswith("log") and param in self.forms else (t / 2).exp()

    def inputs(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        param: str = "logvar",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> list[Tensor]:
        """Locations around 0 and scales around 1, the same for every device."""
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for name in self.arguments:
            size = self.scale_shape(shape) if name in ("logvar", "log_scale", "theta") else shape
            t = torch.randn(tuple(size), generator=generator, dtype=torch.float64)
            t = self.spread * t if name.endswith("logvar") else t
            tensors.append(self.argument(name, t, param).to(device, dtype))
        return tensors

    def __call__(
        self,
        module: ModuleType,
        tensors: Sequence[Tensor],
        param: str = "logvar",
        *,
        event_ndim: int | None = None,
        seed: Tensor | int = SEED,
    ) -> tuple[Tensor, ...]:
        options = dict(self.options)
        if self.gaussian:
            bound = {"param": "logvar", "bound": BOUNDED[param]} if param in BOUNDED else {}
            options |= {"param": param, **bound}
        if self.counts and param in self.forms:
            options["param"] = param
        if self.sums:
            options["event_ndim"] = event_ndim
        if self.draws:
            options["seed"] = seed
        if self.weighted:
            shape = torch.broadcast_shapes(*(t.shape for t in tensors))
            options["weight"] = weights(shape, tensors[0].device)
        result = getattr(module, self.function)(*tensors, **options)
        return result if isinstance(result, tuple) else (result,)


def weights(shape: Shape, device: torch.device | str = "cpu") -> Tensor:
    """0 for some elements; of the first and the last dimension, as a mask of frames is."""
    size = [n if d in (0, len(shape) - 1) else 1 for d, n in enumerate(shape)]
    index = torch.arange(math.prod(size), device=device).reshape(size)
    return torch.tensor([0.5, 0.0, 1.0, -1.0, 1.0], device=device)[index % 5]


def from_logvar(logvar: Tensor, param: str) -> Tensor:
    return {
        **dict.fromkeys(BOUNDED, logvar),
        "logvar": logvar,
        "log_std": logvar / 2,
        "std": torch.exp(logvar / 2),
        "var": torch.exp(logvar),
        "softplus": torch.exp(logvar / 2).expm1().log(),
    }[param]


def _scalar(shape: Shape) -> Shape:
    return ()


def _one_an_example(shape: Shape) -> Shape:
    return (*shape[:1], *(1 for _ in shape[1:]))


Q = ("mu", "logvar")
QP = ("mu", "logvar", "prior_mu", "prior_logvar")
X = ("x", "mean", "logvar")
S = ("x", "mean", "log_scale")
N = ("x", "mean", "theta")

OPS = (
    Op("rsample", "rsample", Q),
    Op("rsample of 2x3 samples", "rsample", Q, {"sample_shape": (2, 3)}),
    Op("kl to N(0, I)", "kl_divergence", Q),
    Op("kl between", "kl_divergence", QP),
    Op("rsample_kl to N(0, I)", "rsample_kl", Q),
    Op("rsample_kl between", "rsample_kl", QP),
    Op("log_ratio to N(0, I)", "rsample_log_ratio", Q),
    Op("log_ratio between", "rsample_log_ratio", QP, spread=0.25),
    Op("log_ratio of 2x3 samples", "rsample_log_ratio", QP, {"sample_shape": (2, 3)}, spread=0.25),
    Op("log_prob, a number", "gaussian_log_prob", X[:2], {"logvar": 0.375}),
    Op("log_prob, a scalar", "gaussian_log_prob", X, scale_shape=_scalar),
    Op(
        "log_prob, per channel",
        "gaussian_log_prob",
        X,
        scale_shape=lambda shape: (*shape[1:2], *(1 for _ in shape[2:])),
    ),
    Op("log_prob, per pixel", "gaussian_log_prob", X, scale_shape=lambda shape: shape[1:]),
    Op(
        "log_prob, per example",
        "gaussian_log_prob",
        X,
        scale_shape=_one_an_example,
    ),
    Op("log_prob, elementwise", "gaussian_log_prob", X),
    Op("bernoulli", "bernoulli_log_prob", ("x", "logits")),
    Op("continuous bernoulli", "continuous_bernoulli_log_prob", ("x", "logits")),
    Op("laplace, a number", "laplace_log_prob", S[:2], {"log_scale": 0.375}),
    Op("laplace, a scalar", "laplace_log_prob", S, scale_shape=_scalar),
    Op("laplace, elementwise", "laplace_log_prob", S),
    Op(
        "discretized logistic, per example",
        "discretized_logistic_log_prob",
        S,
        {"bins": 16, "low": -1.0, "high": 1.5},
        scale_shape=_one_an_example,
    ),
    Op(
        "discretized logistic, per pixel",
        "discretized_logistic_log_prob",
        S,
        scale_shape=lambda shape: shape[1:],
    ),
    Op(
        "discretized logistic, elementwise",
        "discretized_logistic_log_prob",
        S,
        {"bins": 16, "low": -2.0, "high": 2.0},
    ),
    Op("poisson", "poisson_log_prob", ("x", "rate")),
    Op(
        "negative binomial, per gene",
        "negative_binomial_log_prob",
        N,
        scale_shape=lambda shape: shape[1:],
    ),
    Op("negative binomial, elementwise", "negative_binomial_log_prob", N),
    Op(
        "zero-inflated, per gene",
        "zero_inflated_negative_binomial_log_prob",
        (*N, "zero_logits"),
        scale_shape=lambda shape: shape[1:],
    ),
    Op(
        "zero-inflated, elementwise",
        "zero_inflated_negative_binomial_log_prob",
        (*N, "zero_logits"),
    ),
)


# One of each function, weighted.
WEIGHTED = tuple(
    replace(op, name=f"{op.name}, weighted", weighted=True)
    for op in {(op.function, len(op.arguments)): op for op in OPS if op.sums}.values()
)

# Their gradients are not those of their values, and no finite difference finds them.
NOT_DERIVATIVES = (
    Op("balanced kl", "balanced_kl_divergence", QP, {"balance": 0.75}),
    Op("path derivative to N(0, I)", "rsample_log_ratio", Q, {"path_derivative": True}),
    Op(
        "path derivative of 5 samples",
        "rsample_log_ratio",
        QP,
        {"path_derivative": True, "sample_shape": (5,)},
        spread=0.1,
    ),
)


def op_id(op: Op) -> str:
    return op.name


def each_op_and_form(ops: Sequence[Op] = OPS, forms: Sequence[str] = FORMS) -> pytest.MarkDecorator:
    """The arguments `op` and `param` of a test."""
    pairs = [(op, param) for op in ops for param in op.forms if op.counts or param in forms]
    return pytest.mark.parametrize(
        ("op", "param"), pairs, ids=[f"{op.name}-{param}" for op, param in pairs]
    )


def event_ndims(op: Op, param: str, shape: Shape) -> tuple[int | None, ...]:
    """All, but of the first form only: how a scale is written has no part in what is summed."""
    if param == op.forms[0]:
        return (None, *range(len(shape) + 1))
    return (None,) if len(shape) < 2 else (None, 1)


# Vectors of 4 to 16, two of them at once, and every rest of both.
WIDTHS = (*range(1, 37), 47, 48, 49, 63, 64, 65, 70)


# ---- Layouts -------------------------------------------------------------------------------------


def _padded(t: Tensor, dim: int) -> Tensor:
    """`t` as the second half of a tensor whose first half must not be read."""
    return torch.cat([torch.full_like(t, torch.nan), t], dim)


def _reordered(t: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, lying in memory in another order of the dimensions."""
    back = [list(order).index(d) for d in range(t.dim())]
    return t.permute(*order).contiguous().permute(*back)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "half of a chunk": lambda t: _padded(t, 1).chunk(2, 1)[1],
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "half of a channels_last chunk": lambda t: (
        _padded(t, 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1]
    ),
    "odd storage offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: _reordered(t, (3, 1, 2, 0)),
    "reversed in memory": lambda t: _reordered(t, (3, 2, 1, 0)),
    "rows inside": lambda t: _reordered(t, (1, 2, 0, 3)),
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "expanded rows": lambda t: t[:1].expand(t.shape),
    "expanded channels": lambda t: t[:, :1].expand(t.shape),
    "expanded columns": lambda t: t[..., :1].expand(t.shape),
    "expanded scalar": lambda t: t[:1, :1, :1, :1].expand(t.shape),
}
LAYOUT_SHAPE = (3, 5, 4, 7)
