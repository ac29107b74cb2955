"""Random calls: the kernels give what the reference gives, or both raise the same error.

`make fuzz` draws 10,000 cases, `make test` a fixed few hundred. A case that failed is kept below as
an `@example`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import assert_accurate, exact, upstream_like
from cases import BOUNDED, DTYPES, NOT_DERIVATIVES, OPS, PARAMS, Op
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae.ops.bounds import Raised
from fastvae.ops.forms import scale_form
from fastvae.ops.op import Op as DeclaredOp

pytest.importorskip("hypothesis")
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

Draw = st.DrawFn
RARELY = (False,) * 24 + (True,)  # the first is what a case shrinks to
CASES = max(200, settings().max_examples)


@dataclass
class Case:
    """A call, and which tensors want a gradient."""

    op: Op
    tensors: list[Tensor]
    param: str
    event_ndim: int | None
    seed: Any
    needs: list[bool]

    def __call__(self, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return self.op(fastvae, leaves, self.param, event_ndim=self.event_ndim, seed=self.seed)

    def __repr__(self) -> str:
        lying = [(tuple(t.shape), t.stride(), t.storage_offset(), t.dtype) for t in self.tensors]
        return (
            f"{self.op.name}(param={self.param!r}, options={self.op.options}, "
            f"event_ndim={self.event_ndim}, seed={self.seed!r}, needs={self.needs}, "
            f"tensors={lying})"
        )

    @property
    def rounds_prior(self) -> bool:
        """Whether the prior's scale is made another form before it is read, and rounded once more
        to a half type."""
        if "prior_logvar" not in self.op.arguments:
            return False
        own, floor = self.op.options["prior_param"], self.op.options.get("min_std", 0.0)
        param = "logvar" if self.param in BOUNDED else self.param
        form, _ = scale_form(param, None, floor)
        is_read_as_it_is = floor == 0 and form == (own or param)
        return not is_read_as_it_is and any(t.dtype.itemsize == 2 for t in self.tensors)


@st.composite
def laid_out(draw: Draw, t: Tensor) -> Tensor:
    """The same values, lying in memory in some other way."""
    order = draw(st.permutations(range(t.dim())))
    t = t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])
    for d in range(t.dim()):
        match draw(st.sampled_from(("as it is",) * 4 + ("step", "offset", "expand"))):
            case "step":
                t = t.repeat_interleave(2, d)[(slice(None),) * d + (slice(None, None, 2),)]
            case "offset":
                t = torch.cat([torch.full_like(t, math.nan), t], d).narrow(
                    d, t.shape[d], t.shape[d]
                )
            case "expand" if t.shape[d] > 1:
                t = t.narrow(d, 0, 1).expand(t.shape)
    return t


@st.composite
def ops(draw: Draw) -> tuple[Op, str]:
    """An op with a floor of its scales and a form of the prior's own, and the form of q's."""
    op = draw(st.sampled_from(OPS + NOT_DERIVATIVES))
    if not op.gaussian:
        return op, draw(st.sampled_from(op.forms))
    forms = (*PARAMS, "softplus")
    param = draw(st.sampled_from((*forms, *BOUNDED)))
    options = dict(op.options)
    if param not in BOUNDED or draw(st.sampled_from(RARELY)):
        floors = (0.0, 0.0, 1e-3, 0.5) + (
            (-0.1, math.inf, math.nan) if draw(st.sampled_from(RARELY)) else ()
        )
        options["min_std"] = draw(st.sampled_from(floors))
    if "prior_logvar" in op.arguments:
        options["prior_param"] = draw(st.sampled_from((None,) * len(forms) + forms))
    return replace(op, options=options), param


@st.composite
def weights(draw: Draw, shape: tuple[int, ...]) -> Any:
    """From -1 to 1, of some of the dimensions, or a mask, or a number."""
    kind = draw(st.sampled_from(("none", "tensor", "tensor", "mask", "number")))
    if kind == "none":
        return None
    if kind == "number":
        return draw(st.sampled_from((0.5, 0, True)))
    size = [n if draw(st.booleans()) else 1 for n in shape]
    size = size[draw(st.integers(0, len(size))) :]
    if size and draw(st.sampled_from(RARELY)):
        size[-1] += 1  # mostly wrong
    index = torch.arange(math.prod(size)).reshape(size)
    weight = torch.tensor([0.5, 0.0, 1.0, -1.0, 1.0], dtype=draw(st.sampled_from(DTYPES)))[
        index % 5
    ]
    return draw(laid_out(weight > 0 if kind == "mask" else weight))


@st.composite
def cases(draw: Draw) -> Case:
    op, param = draw(ops())
    sizes = st.sampled_from((3, 1, 2, 0, 4, 5, 8, 17, 33))
    shape = draw(st.lists(sizes, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = []
    for name in op.arguments:
        size = [n if not draw(st.sampled_from(RARELY)) else 1 for n in shape]
        if draw(st.sampled_from(RARELY)):
            size = size[draw(st.integers(0, len(size))) :]
        if size and draw(st.sampled_from(RARELY + RARELY)):
            size[-1] += 1  # mostly wrong
        t = torch.randn(size, generator=generator, dtype=torch.float64)
        own = op.options.get("prior_param") if name == "prior_logvar" else None
        t = op.argument(name, t, own or param, zeros=True)
        other = draw(st.sampled_from(DTYPES)) if draw(st.sampled_from(RARELY)) else dtype
        tensors.append(draw(laid_out(t.to(other))))
    if op.sums:
        op = replace(op, options={**op.options, "weight": draw(weights(tuple(shape)))})
    if op.gaussian and draw(st.sampled_from(RARELY)):
        param = draw(st.sampled_from(("sigma", "", None)))
    event_ndim = draw(st.sampled_from((None, *range(len(shape) + 1))))
    if draw(st.sampled_from(RARELY)):
        event_ndim = draw(st.sampled_from((-1, 9, True)))
    rows = shape[0] if shape else 3
    seed = draw(
        st.sampled_from(
            (5, -(2**63), 2**63 - 1, torch.tensor(7), torch.arange(rows), torch.arange(rows + 1))
            + ((2**63, 1.5, torch.tensor(1.0)) if draw(st.sampled_from(RARELY)) else ())
        )
    )
    needs = [draw(st.booleans()) for _ in tensors]
    return Case(op, tensors, param, event_ndim, seed, needs)


def outcome(case: Case, backend: str) -> Exception | list[Tensor]:
    """Outputs and gradients, or the error."""
    leaves = [
        t.detach().requires_grad_(need) for t, need in zip(case.tensors, case.needs, strict=True)
    ]
    with fastvae.use_backend(backend):
        try:
            outputs = case(leaves)
        except (TypeError, ValueError) as error:
            return error
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if not wanted:
            return [*outputs]
        upstream = upstream_like([y.detach() for y in outputs])
        # The reference's z does not depend on the prior, and does not say that it does.
        pairs = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            wanted,
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    return [*outputs, *grads]


def check(case: Case) -> None:
    native, plain = outcome(case, "native"), outcome(case, "reference")
    if isinstance(native, Exception) or isinstance(plain, Exception):
        assert (type(native), str(native)) == (type(plain), str(plain))
        return
    assert [(y.shape, y.dtype) for y in native] == [(y.shape, y.dtype) for y in plain]
    assert all(y.requires_grad or not z.requires_grad for y, z in zip(native, plain, strict=True))
    # Not nearer than the reference itself is in its own dtype; `exact` below is strict.
    loose = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-5}
    for y, value in zip(native, plain, strict=True):
        scale = max(1.0, value.detach().double().abs().max().item() if value.numel() else 0.0)
        torch.testing.assert_close(
            y.double(), value.double(), rtol=loose[y.dtype], atol=loose[y.dtype] * scale
        )
    if case.rounds_prior:
        return
    outputs = native[: len(native) - sum(case.needs)]
    options = {"event_ndim": case.event_ndim, "seed": case.seed}
    dtype = case.tensors[0].dtype
    assert_accurate(outputs, exact(case.op, case.tensors, case.param, **options), dtype)
    upstream = upstream_like([y.detach() for y in outputs])
    right = exact(case.op, case.tensors, case.param, **options, upstream=upstream)
    chosen = [k for k, need in enumerate(case.needs) if need]
    right = type(right)(
        tuple(right.values[k] for k in chosen), tuple(right.magnitudes[k] for k in chosen)
    )
    assert_accurate(native[len(outputs) :], right, dtype)


@settings(max_examples=CASES)
@given(cases())
def test_native_is_reference(case: Case) -> None:
    check(case)


@st.composite
def categoricals(draw: Draw) -> tuple[list[Tensor], dict[str, Any]]:
    """Posterior and prior logits, and the options."""
    sizes = st.sampled_from((3, 1, 2, 0, 4, 5, 8, 17, 33))
    shape = draw(st.lists(sizes, min_size=1, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = []
    for _ in range(2):
        size = shape[draw(st.integers(0, len(shape) - 1)) :] if draw(st.booleans()) else shape
        t = 3 * torch.randn(size, generator=generator, dtype=torch.float64)
        other = draw(st.sampled_from(DTYPES)) if draw(st.sampled_from(RARELY)) else dtype
        tensors.append(draw(laid_out(t.to(other))))
    return tensors, {
        "uniform_mix": draw(st.sampled_from((0.0, 0.01, 0.5))),
        "balance": draw(st.sampled_from((0.8, 0, 1))),
        "free_nats": draw(st.sampled_from((0.0, 1.0, 3.0))),
        "event_ndim": draw(st.sampled_from((None, *range(len(shape) + 1)))),
    }


@settings(max_examples=CASES)
@given(categoricals())
def test_categoricals_are_the_reference(case: tuple[list[Tensor], dict[str, Any]]) -> None:
    tensors, options = case

    def outcome(module: Any) -> Exception | list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        try:
            kl = module.balanced_categorical_kl_divergence(*leaves, **options)
            mix = options["uniform_mix"]
            z = module.straight_through_categorical(leaves[0], uniform_mix=mix, seed=5)
        except (TypeError, ValueError) as error:
            return error
        upstream = upstream_like([kl.detach(), z.detach()])
        grads = torch.autograd.grad(kl, leaves, upstream[0])
        return [kl, *grads, z, *torch.autograd.grad(z, leaves[:1], upstream[1])]

    native, plain = outcome(fastvae), outcome(reference)
    if isinstance(native, Exception) or isinstance(plain, Exception):
        assert (type(native), str(native)) == (type(plain), str(plain))
        return
    for y, value in zip(native, plain, strict=True):
        assert (y.shape, y.dtype) == (value.shape, value.dtype)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}.get(
            y.dtype, torch.finfo(y.dtype).eps
        )
        scale = max(1.0, value.detach().double().abs().max().item() if value.numel() else 0.0)
        torch.testing.assert_close(y, value, rtol=tolerance, atol=tolerance * scale)


def _wrong_sigma() -> Any:
    sigma = reference.sigma
    return mock.patch("fastvae.ops.gaussian.sigma", lambda s, param: 1.0001 * sigma(s, param))


def _wrong_floor() -> Any:
    right = Raised.__call__
    return mock.patch.object(
        Raised, "__call__", lambda self, s: right(replace(self, floor=1.001 * self.floor), s)
    )


def _wrong_weights() -> Any:
    right = DeclaredOp._weighted

    def wrong(self: Any, *args: Any) -> Any:
        *others, settings = args
        return right(self, *others, {**settings, "weight": 1.0001 * settings["weight"]})

    return mock.patch.object(DeclaredOp, "_weighted", wrong)


@pytest.mark.parametrize("mistake", [_wrong_sigma, _wrong_floor, _wrong_weights])
def test_a_slight_mistake_is_found(mistake: Callable[[], Any]) -> None:
    """The negative control."""

    @settings(max_examples=200, database=None, phases=[Phase.generate])
    @given(cases())
    def search(case: Case) -> None:
        check(case)

    with mistake(), pytest.raises(AssertionError):
        search()
