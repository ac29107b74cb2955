"""What torch.ops.fastvae promises to PyTorch: `torch.library.opcheck`, and every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, LAYOUT_SHAPE, LAYOUTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fastvae import backend
from fastvae.ops.layout import schemas

ops = torch.ops.fastvae
pytestmark = pytest.mark.skipif(not backend.native_enabled(), reason="needs the binary")

NAMES = [
    name + direction
    for name, _ in schemas()
    for direction in ("", "_backward", "_with_grad")
    if hasattr(ops, name + direction)
]


def operator_calls(
    name: str, q: list[Tensor], packed: Tensor | None = None, packed_dim: int = 1
) -> list[tuple[Any, ...]]:
    """Arguments of an op, from four tensors that broadcast against each other."""
    a, b, c, d = q
    seed = torch.tensor(7, device=a.device)
    shape = torch.broadcast_shapes(*(t.shape for t in q))
    z = a.new_empty(shape).normal_()
    row_type = torch.float64 if a.dtype == torch.float64 else torch.float32
    ndim = len(shape)

    def rows(n: int) -> Tensor:
        return torch.randn(shape[: ndim - n], dtype=row_type, device=a.device)

    def weight(n: int) -> Tensor | None:
        return torch.rand(shape[-1:], dtype=row_type, device=a.device) if n == 1 else None

    events = sorted({0, min(1, ndim), max(ndim - 1, 0), ndim})
    calls: list[tuple[Any, ...]] = []
    forward = name.removesuffix("_backward").removesuffix("_with_grad")
    match forward, name != forward:
        case "rsample", backward:
            pair = torch.broadcast_shapes(a.shape, b.shape)
            for samples in ([], [2, 1]):
                g = torch.randn((*samples, *pair), device=a.device).to(a.dtype)
                arguments = (a, b, seed, 0, -1, samples)
                calls += [(g, *arguments, n) for n in (1, 2, 3)] if backward else [arguments]
            if packed is not None:
                half = packed.narrow(packed_dim, 0, packed.shape[packed_dim] // 2)
                arguments = (packed, None, seed, 0, packed_dim, [])
                calls += [(half.clone(), *arguments, 1)] if backward else [arguments]
        case ("kl_divergence" | "rsample_kl" | "rsample_log_ratio") as base, backward:
            for n in events:
                seeds = (seed,) if base.startswith("rsample") else ()
                for prior in ((None, None), (c, d)):
                    if prior[0] is None and torch.broadcast_shapes(a.shape, b.shape) != shape:
                        continue
                    upstream = (z, rows(n)) if seeds else (rows(n),)
                    arguments = (a, b, *prior, *seeds, weight(n), 0, -1, n)
                    if base == "rsample_log_ratio":
                        upstream = tuple(g.expand(2, *g.shape) for g in upstream)
                        arguments = (*arguments, [2], n == 1)
                    needs = (3,) if prior[0] is None else (5, 15)
                    calls += (
                        [(*upstream, *arguments, k) for k in needs] if backward else [arguments]
                    )
        case "gaussian_log_prob", backward:
            for n in events:
                for scale in (None, d):
                    if scale is None and torch.broadcast_shapes(a.shape, b.shape) != shape:
                        continue
                    arguments = (a, b, scale, weight(n), 0.5, 0, n)
                    used = torch.broadcast_shapes(
                        *(t.shape for t in arguments[:3] if t is not None)
                    )
                    if used != shape:
                        continue
                    calls += [(rows(n), *arguments, 7)] if backward else [arguments]
        case (("bernoulli_log_prob" | "continuous_bernoulli_log_prob"), backward):
            shape = torch.broadcast_shapes(a.shape, b.shape)
            ndim = len(shape)
            for n in sorted({0, ndim // 2, ndim}):
                arguments = (a, b, weight(n), n)
                calls += [(rows(n), *arguments, k) for k in (1, 3)] if backward else [arguments]
            return calls
        case ("laplace_log_prob" | "discretized_logistic_log_prob") as base, backward:
            laplace = base == "laplace_log_prob"
            for scale in (None, d) if laplace else (d,):
                given = (a, b) if scale is None else (a, b, scale)
                shape = torch.broadcast_shapes(*(t.shape for t in given))
                ndim = len(shape)
                for n in sorted({0, ndim // 2, ndim}):
                    settings = (0.5,) if laplace else (16, 0.0, 1.0)
                    arguments = (a, b, scale, weight(n), *settings, n)
                    calls += [(rows(n), *arguments, 7)] if backward else [arguments]
            return calls
    # A Gaussian's bound is behind all else.
    return [*calls, *((*arguments, [1.0, -0.5, 1.0]) for arguments in calls[-1:])]


def tensors_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, device: torch.device) -> None:
    q = tensors_of((3, 4, 5), torch.float32, device)
    packed = torch.randn(3, 8, 5, device=device)
    for arguments in operator_calls(name, q, packed):
        opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(("_backward", "_with_grad"))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_broadcast_and_transposed_tensors(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    a, b, c, d = tensors_of((3, 4, 5), dtype, device)
    for arguments in operator_calls(name, [a.mT.contiguous().mT, b[:, :1], c[0], d[0, 0, 0]]):
        opcheck(getattr(ops, name).default, arguments)


def described(result: Any) -> list[Any]:
    outputs = result if isinstance(result, tuple | list) else [result]
    return [
        None
        if y is None
        else (
            y.dtype,
            tuple(y.shape),
            tuple(s for n, s in zip(y.shape, y.stride(), strict=True) if n > 1),
        )
        for y in outputs
    ]


def assert_described(name: str, arguments: tuple[Any, ...]) -> None:
    real = getattr(ops, name)(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments]
        fake = getattr(ops, name)(*fakes)
    assert described(fake) == described(real)
    metas = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    metas = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        if isinstance(t, Tensor)
        else t
        for t in arguments
    ]
    assert described(getattr(ops, name)(*metas)) == described(real)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_shapes_and_strides_are_foretold(
    name: str, layout: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    plain = tensors_of(LAYOUT_SHAPE, torch.bfloat16, device)
    even = torch.cat([plain[0], plain[1]], 1)
    laid = [layout(t) for t in plain]
    for q, packed in ((laid, layout(even)), ([laid[0], *plain[1:]], None)):
        for arguments in operator_calls(name, q, packed):
            assert_described(name, arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (4, 1), (1, 5), (2, 1, 3)], ids=str)
def test_shapes_of_few_elements_are_foretold(
    name: str, shape: tuple[int, ...], device: torch.device
) -> None:
    for arguments in operator_calls(name, tensors_of(shape, torch.float64, device)):
        assert_described(name, arguments)


def test_the_comparison_sees_another_stride() -> None:
    """The negative control: a transposed result is not what was foretold."""
    t = torch.zeros(3, 4)
    assert described(t) != described(t.mT.contiguous().mT)
    assert described(t) != described(t.double())
