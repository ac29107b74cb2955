"""The table that the tests of the ops are driven by: what is called, with which tensors, lying how.

`exact` gives what a call should, and `assert_accurate` holds a call to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae.ops.gaussian import log_sigma

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
PATH_DERIVATIVES = (
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


# ---- What is right -------------------------------------------------------------------------------


def normals(
    *shape: int,
    seed: Tensor | int = 7,
    sample_shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The kernels' noise itself, which tests/test_noise.py holds to the reference's."""
    mu = torch.zeros(shape, dtype=dtype, device=device)
    return fastvae.rsample(mu, 1.0, param="std", seed=seed, sample_shape=sample_shape)


def kernel_noise(seed: Tensor, shape: Shape, *, sample_shape: Shape = ()) -> Tensor:
    """In place of `reference.noise`."""
    return normals(*shape, seed=seed, sample_shape=tuple(sample_shape), device=seed.device)


@dataclass(frozen=True)
class Exact:
    """float64 results and, for each element, the sum of the magnitudes of the terms it adds up."""

    values: tuple[Tensor, ...]
    magnitudes: tuple[Tensor, ...]


def exact(
    op: Op,
    tensors: Sequence[Tensor],
    param: str = "logvar",
    *,
    event_ndim: int | None = None,
    seed: Tensor | int = SEED,
    upstream: Sequence[Tensor] | None = None,
) -> Exact:
    """The reference in float64, with the kernels' noise: results, or gradients for `upstream`."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    leaves = [t.detach().double().expand(shape).requires_grad_() for t in tensors]
    with mock.patch("fastvae.ops.noise.noise", kernel_noise):
        outputs = op(reference, leaves, param, event_ndim=event_ndim, seed=seed)
        terms = op(reference, leaves, param, event_ndim=0, seed=seed)
    apart = None
    if op.function == "rsample_log_ratio":
        apart = _summed(_rounded_apart(leaves, terms[0], param), outputs[1])
    if upstream is None:
        values = tuple(y.detach() for y in outputs)
        magnitudes = [_summed(t.detach().abs(), y) for t, y in zip(terms, values, strict=True)]
        if apart is not None:
            magnitudes[1] = magnitudes[1] + apart.detach()
        return Exact(values, tuple(magnitudes))
    wanted = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    values = torch.autograd.grad(outputs, leaves, [g.double() for g in upstream], **wanted)
    from_each = [  # output and sample, the gradients of all leaves
        torch.autograd.grad(y, leaves, one.double(), **wanted)
        for y, g in zip(outputs, upstream, strict=True)
        for one in _one_by_one(g, len(op.options.get("sample_shape", ())))
    ]
    if apart is not None:
        one = upstream[1].double().abs()
        from_each.append(torch.autograd.grad(apart, leaves, one, **wanted))
    parts = list(zip(*from_each, strict=True))  # of each leaf
    return Exact(
        tuple(g.sum_to_size(t.shape) for t, g in zip(tensors, values, strict=True)),
        tuple(
            sum(g.abs() for g in p).sum_to_size(t.shape)
            for t, p in zip(tensors, parts, strict=True)
        ),
    )


def _summed(elements: Tensor, output: Tensor) -> Tensor:
    """Over an event, as an output is."""
    return elements.flatten(output.dim()).sum(-1) if output.dim() < elements.dim() else elements


def _rounded_apart(leaves: Sequence[Tensor], z: Tensor, param: str) -> Tensor:
    """1/2 ((|mu - mu_p| + sigma |eps|) / sigma_p)^2: the 1/2 w^2 of a log-ratio if nothing
    cancelled in w = (z - mu_p) / sigma_p = ((mu - mu_p) + sigma eps) / sigma_p.

    With u = 2^-24, mu - mu_p is off by u |mu - mu_p|, sigma eps by 2 u sigma |eps| (the error of
    sigma), and their sum by u of itself, however small it is. So w is off by at most
    2 u (|mu - mu_p| + sigma |eps|) / sigma_p and a few u of itself, w^2 / 2 by |w| times that, and
    the gradient by mu, w / sigma_p, by that over sigma_p: where the two nearly cancel and sigma_p
    is small, by many times its own size. No code does better that is given mu, sigma and mu_p. The
    gradients of this expression are what those errors are relative to.
    """
    mu, _, *prior = leaves
    difference = (mu - prior[0] if prior else mu).abs() + (z - mu).abs()
    form = param.partition(",")[0]  # a bound is of q alone
    h = log_sigma(prior[1], form) if prior else torch.zeros(())
    return 0.5 * (difference * torch.exp(-h).to(mu.device)).square()


def _one_by_one(t: Tensor, dims: int) -> Iterator[Tensor]:
    """`t` with all but one index of its first dimensions set to 0, for each index."""
    for index in product(*map(range, t.shape[:dims])):
        alone = torch.zeros_like(t)
        alone[index] = t[index]
        yield alone


def upstream_like(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Upstream gradients that are not ones."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
        for y in outputs
    ]


def gradients(
    op: Op,
    tensors: Sequence[Tensor],
    param: str = "logvar",
    *,
    upstream: Callable[[Sequence[Tensor]], Sequence[Tensor]] = upstream_like,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """The fused gradients of `tensors`, which keep their layout, and the upstream ones."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = op(fastvae, leaves, param, **options)
    grad_outputs = list(upstream([y.detach() for y in outputs]))
    return list(torch.autograd.grad(outputs, leaves, grad_outputs)), grad_outputs


# ---- How near ------------------------------------------------------------------------------------

# Of float32 arithmetic (half types are computed in it) and of float64 arithmetic. Both are stricter
# than the error that eager PyTorch makes, and small against it for half types. In float64 the right
# values are float64 sums themselves: of a hundred equal terms each is off by half of this.
PRECISION = {dtype: 2e-14 if dtype == torch.float64 else 1e-6 for dtype in DTYPES}


def tolerance(computed: torch.dtype, stored: torch.dtype) -> float:
    """The relative error allowed: of the arithmetic, and of one rounding to a narrower type."""
    is_half = stored in (torch.bfloat16, torch.float16)
    is_rounded = is_half or (computed, stored) == (torch.float64, torch.float32)
    return PRECISION[computed] + (torch.finfo(stored).eps / 2 if is_rounded else 0)


def error(result: Tensor, value: Tensor, magnitude: Tensor) -> float:
    """The largest error, relative to the magnitude of an element, the mean one or 1 (all inputs are
    around 1), whichever is greatest.

    Infinite where one of the two is not finite and the other is not the same.
    """
    assert result.shape == value.shape
    result, value = result.detach().double(), value.double()
    finite = magnitude[magnitude.isfinite()]
    floor = max(finite.mean().item(), 1) if finite.numel() else 1
    relative = (result - value).abs() / magnitude.clamp(min=floor)
    same = (result == value) | (result.isnan() & value.isnan())
    found = relative.nan_to_num(nan=torch.inf).masked_fill(same, 0)
    return found.max().item() if found.numel() else 0.0


def assert_accurate(results: Sequence[Tensor], right: Exact, computed: torch.dtype) -> None:
    for k, (y, value, magnitude) in enumerate(
        zip(results, right.values, right.magnitudes, strict=True)
    ):
        found, allowed = error(y, value, magnitude), tolerance(computed, y.dtype)
        assert found <= allowed, f"result {k} is off by {found:.2e}, allowed {allowed:.2e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, except that all NaNs are one."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    equal = (a == b) & (a.signbit() == b.signbit())
    return bool((equal | (a.isnan() & b.isnan())).all())
