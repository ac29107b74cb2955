"""What is timed, on which shapes, and how many bytes each case has to move at the least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .shapes import SAMPLES, Shape, Size

__all__ = [
    "DIRECTIONS",
    "DREAMER",
    "DTYPES",
    "MIN_STD",
    "OPS",
    "SIGMA",
    "TARGETS",
    "Case",
    "Op",
    "Traffic",
    "fits",
]

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
DIRECTIONS = ("forward", "backward", "forward+backward")
SIGMA = 0.5  # of a likelihood whose standard deviation is fixed
MIN_STD = 0.1  # PlaNet's
DREAMER = {"balance": 5 / 6, "uniform_mix": 0.01, "free_nats": 1.0}  # DreamerV3's


# ---- Ops -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """The tensors that one pass cannot but read and write, by name."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = (("reads", self.reads), ("writes", self.writes))
        return "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts if names)


def _whole(size: Size) -> Size:
    return size


@dataclass(frozen=True)
class Op:
    """A public function, called in one way.

    The noise is neither read nor written at the limit: the seed stands for it.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    forward: Traffic
    backward: Traffic
    constants: tuple[str, ...] = ()
    """Inputs that want no gradient, the first ones: the data, and what weighs them."""
    data: str = "normal"
    """What the data are: "normal"; "binary"; "grey", of 256 levels in [0, 1]; or "counts", most of
    them 0."""
    scale_size: Callable[[Size], Size] = _whole
    """Size of a likelihood's scale, from that of the mean."""
    shapes: tuple[str, ...] = ("128x20", "64x16384")
    """Timed where the user names no shapes."""
    directions: tuple[str, ...] = DIRECTIONS
    samples: tuple[int, ...] = ()
    """Dimensions in front of the outputs."""
    components: int = 0
    """Of a mixture: the rows of its mu and logvar, or what each pixel's colours are made of."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """What else fastvae's function is given."""
    formula: str = ""
    """The method of `formulas.Library` that has it, where it is not named as the function."""

    @property
    def function(self) -> str:
        return self.name.partition(":")[0]

    @property
    def method(self) -> str:
        return self.formula or self.function

    @property
    def draws(self) -> bool:
        return "z" in self.outputs

    @property
    def compares(self) -> bool:
        """Rows with components, whatever they are."""
        return "z" in self.inputs

    def size(self, operand: str, size: Size) -> Size:
        """Of a tensor, where the op's elements are `size`; a gradient has that of its tensor."""
        operand = operand.removeprefix("grad_")
        if operand == "loss":
            return ()
        if operand in self.outputs:
            return (*self.samples, *(size if operand == "z" else size[:1]))
        if operand == "parameters":
            return (size[0], 10 * self.components, *size[2:])
        if self.compares and self.components and operand != "z":
            return (self.components, *(() if operand == "log_weights" else size[1:]))
        is_scale = operand in ("logvar", "log_scale", "theta") and "mean" in self.inputs
        return self.scale_size(size) if is_scale else size


_Q = ("mu", "logvar")
_P = ("prior_mu", "prior_logvar")


def _gradients(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"grad_{name}" for name in names)


def _latent(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Op:
    return Op(
        name,
        inputs,
        outputs,
        forward=Traffic(inputs, outputs),
        backward=Traffic((*_gradients(outputs), *inputs), _gradients(inputs)),
    )


def _mixture(components: int, shape: str) -> Op:
    inputs = ("z", *_Q, "log_weights")
    name = f"mixture_log_prob:{components}"
    return replace(_latent(name, inputs, ("log_prob",)), shapes=(shape,), components=components)


def _scalar(size: Size) -> Size:
    return ()


def _channels(size: Size) -> Size:
    return (size[1], *(1 for _ in size[2:]))


def _genes(size: Size) -> Size:
    return size[1:]


def _likelihood(
    name: str,
    wanted: tuple[str, ...],
    shapes: tuple[str, ...],
    scale_size: Callable[[Size], Size] = _whole,
    data: str = "normal",
    constants: tuple[str, ...] = ("x",),
    **others: Any,
) -> tuple[Op, Op]:
    """The log-probability, and the loss whose gradient is known when forward runs."""
    inputs = (*constants, *wanted)
    log_prob = Op(
        name,
        inputs,
        ("log_prob",),
        forward=Traffic(inputs, ("log_prob",)),
        backward=Traffic(("grad_log_prob", *inputs), _gradients(wanted)),
        constants=constants,
        data=data,
        scale_size=scale_size,
        shapes=shapes,
        **others,
    )
    loss = replace(
        log_prob,
        name=name.replace("log_prob", "nll_loss"),
        formula=log_prob.formula.replace("log_prob", "nll_loss"),
        outputs=("loss",),
        forward=Traffic(inputs, ("loss", *_gradients(wanted))),
        backward=Traffic(),
        directions=("forward", "forward+backward"),
    )
    return log_prob, loss


_IMAGES = ("128x784", "64x3x64x64")
_GAUSSIAN = ("128x784", "64x16384")
_SCALED = ("mean", "logvar")
_GENES = ("128x2000", "128x10000")
_LIKELIHOODS = (
    _likelihood(
        "gaussian_log_prob:sigma", ("mean",), _GAUSSIAN, options={"logvar": SIGMA, "param": "std"}
    ),
    _likelihood("gaussian_log_prob:scalar", _SCALED, _GAUSSIAN, _scalar),
    _likelihood("gaussian_log_prob:channel", _SCALED, ("64x3x64x64",), _channels),
    _likelihood("gaussian_log_prob:elementwise", _SCALED, _GAUSSIAN),
    _likelihood(
        "gaussian_log_prob:weighted",
        _SCALED,
        _GAUSSIAN,
        constants=("x", "weight"),
        formula="gaussian_log_prob_weighted",
    ),
    _likelihood("bernoulli_log_prob", ("logits",), _IMAGES, data="binary"),
    _likelihood("continuous_bernoulli_log_prob", ("logits",), _IMAGES, data="grey"),
    _likelihood("laplace_log_prob:fixed", ("mean",), _IMAGES, data="grey"),
    _likelihood("laplace_log_prob", ("mean", "log_scale"), _IMAGES, _scalar, "grey"),
    _likelihood("discretized_logistic_log_prob", ("mean", "log_scale"), _IMAGES, data="grey"),
    _likelihood("poisson_log_prob", ("mean",), _GENES, data="counts"),
    _likelihood("negative_binomial_log_prob", ("mean", "theta"), _GENES, _genes, "counts"),
    _likelihood(
        "zero_inflated_negative_binomial_log_prob",
        ("mean", "theta", "zero_logits"),
        _GENES,
        _genes,
        "counts",
    ),
)


_COLOURS, _ = _likelihood(
    "colour_mixture_log_prob",
    ("parameters",),
    ("16x3x32x32",),
    data="grey",
    components=10,
    options={"components": 10, "low": 0.0},
)

OPS = {
    op.name: op
    for op in (
        # dz/dmu is 1: the gradient of z is mu's, and backward reads no mu.
        Op(
            "rsample",
            _Q,
            ("z",),
            forward=Traffic(_Q, ("z",)),
            backward=Traffic(("grad_z", "logvar"), ("grad_logvar",)),
        ),
        _latent("kl_divergence", _Q, ("kl",)),
        _latent("kl_divergence:prior", (*_Q, *_P), ("kl",)),
        _latent("balanced_kl_divergence", (*_Q, *_P), ("kl",)),
        _latent("rsample_kl", _Q, ("z", "kl")),
        _latent("rsample_kl:prior", (*_Q, *_P), ("z", "kl")),
        replace(
            _latent("rsample_kl:softplus", _Q, ("z", "kl")),
            options={"param": "softplus", "min_std": MIN_STD},
            formula="rsample_kl_softplus",
        ),
        replace(
            _latent("rsample_log_ratio", _Q, ("z", "log_ratio")),
            shapes=("128x64",),
            samples=(SAMPLES,),
        ),
        _mixture(500, "128x40"),
        _mixture(1000, "256x64"),
        replace(
            _latent("aggregate_log_prob", ("z", *_Q), ("joint", "marginals")),
            shapes=("256x32", "1024x32"),
        ),
        Op(
            "straight_through_categorical",
            ("logits",),
            ("z",),
            forward=Traffic(("logits",), ("z",)),
            backward=Traffic(("grad_z", "logits"), ("grad_logits",)),
            shapes=("1024x32x32",),
            options={"uniform_mix": DREAMER["uniform_mix"]},
        ),
        replace(
            _latent("balanced_categorical_kl_divergence", ("logits", "prior_logits"), ("kl",)),
            shapes=("1024x32x32",),
            options=DREAMER,
        ),
        _likelihood("multinomial_log_prob", ("logits",), ("512x50000",), data="binary")[0],
        _COLOURS,
        *(log_prob for log_prob, _ in _LIKELIHOODS),
        *(loss for _, loss in _LIKELIHOODS),
    )
}


_SUMS = ("kl", "log_prob", "log_ratio", "loss", "joint", "marginals")


# ---- Cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    op: Op
    shape: Shape
    dtype: torch.dtype = torch.float32
    direction: str = "forward+backward"
    threads: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        name = f"{self.op.name} {self.shape.name} {self.dtype_name} {self.direction}"
        return f"{name}, {self.threads} threads" if self.device == "cpu" else name

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shape.sizes))

    @property
    def passes(self) -> tuple[Traffic, ...]:
        return tuple(getattr(self.op, name) for name in self.direction.split("+"))

    def bytes_of(self, operands: Iterable[str]) -> int:
        """In all calls. Sums over an event are float32 where the inputs are of a half type."""
        total = 0
        for operand in operands:
            is_sum = operand.removeprefix("grad_") in _SUMS
            item = max(4, self.dtype.itemsize) if is_sum else self.dtype.itemsize
            total += sum(item * math.prod(self.op.size(operand, s)) for s in self.shape.sizes)
        return total

    @property
    def bytes(self) -> int:
        """Read and written where nothing is touched twice in a pass."""
        return sum(self.bytes_of((*t.reads, *t.writes)) for t in self.passes)


def fits(op: Op, shape: Shape) -> bool:
    """Whether a shape can be an op's: only a posterior comes in halves or in levels."""
    if op.function.startswith("colour") and any(size[1] != 3 for size in shape.sizes):
        return False  # whose pixels have three colours
    if op.function.startswith("multinomial") and any(len(size) > 2 for size in shape.sizes):
        return False  # whose rows have one dimension
    return ("mu" in op.inputs and not op.compares) or (not shape.halves and len(shape.sizes) == 1)


# What this package promises for float32, forward + backward, two threads: how many times a peer's
# time is fastvae's.
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("rsample_kl", "64x16384"): {"eager": 9, "compile": 15, "jax": 3.5},
    ("rsample_kl", "1024x128"): {"eager": 5, "compile": 10, "jax": 3},
    ("rsample_kl", "128x20"): {"eager": 2, "compile": 2},
    ("rsample_kl", "32x262144"): {"eager": 8, "compile": 8, "jax": 3},
    ("rsample_log_ratio", "128x64"): {"eager": 4},
    ("kl_divergence:prior", "64x16384"): {"eager": 8, "compile": 4},
    ("kl_divergence:prior", "128x20"): {"eager": 2, "compile": 2},
    ("kl_divergence", "64x16384"): {"eager": 6, "compile": 1.5},
    ("gaussian_log_prob:elementwise", "64x16384"): {"eager": 6, "compile": 1.2},
    ("gaussian_log_prob:sigma", "64x16384"): {"eager": 5, "compile": 1.1},
    ("negative_binomial_log_prob", "128x2000"): {"eager": 9, "compile": 5},
    ("negative_binomial_log_prob", "128x10000"): {"eager": 9, "compile": 5},
    ("mixture_log_prob:500", "128x40"): {"eager": 25, "compile": 2},
    ("mixture_log_prob:1000", "256x64"): {"eager": 80, "compile": 10, "idiom": 1},
    ("aggregate_log_prob", "1024x32"): {"eager": 30, "compile": 8},
    ("multinomial_log_prob", "512x50000"): {"idiom": 2},
    ("colour_mixture_log_prob", "16x3x32x32"): {"eager": 10},
    ("straight_through_categorical", "1024x32x32"): {"distributions": 5},
    ("balanced_categorical_kl_divergence", "1024x32x32"): {"distributions": 5},
    ("zero_inflated_negative_binomial_log_prob", "128x2000"): {"eager": 10, "compile": 6},
    ("zero_inflated_negative_binomial_log_prob", "128x10000"): {"eager": 10, "compile": 6},
}
