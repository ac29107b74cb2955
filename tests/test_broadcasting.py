"""Any shapes that broadcast, in any memory order: values and gradients are the reference's."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate, exact, gradients
from cases import DTYPES, OPS, Op, op_id
from torch import Tensor

import fastvae

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def operands(
    draw: st.DrawFn, op: Op, dtype: torch.dtype, param: str, device: torch.device
) -> list[Tensor]:
    """Tensors of up to five dimensions, each with its own ones, order in memory and gaps."""
    sizes = st.lists(st.integers(0, 7) | st.just(17), max_size=5)
    shape = draw(sizes.filter(lambda sizes: math.prod(sizes) <= 20000))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = []
    for name in op.arguments:
        size = [1 if draw(st.integers(0, 3)) == 0 else n for n in shape]
        size = size[draw(st.sampled_from([0, 0, 0, *range(len(shape) + 1)])) :]
        order = draw(st.permutations(range(len(size))))
        gap = draw(st.sampled_from([1, 1, 2]))
        expanded = [draw(st.integers(0, 5)) == 0 for _ in size]
        memory = [1 if expanded[d] else size[d] for d in order]
        t = torch.randn([*memory, gap], generator=generator, dtype=torch.float64)
        t = op.argument(name, t, param, zeros=True)
        t = t.to(device, dtype)[..., 0]
        back = [list(order).index(d) for d in range(len(size))]
        tensors.append(t.permute(back).expand(size))
    return tensors


@pytest.mark.parametrize("op", [op for op in OPS if op.scale_shape is tuple], ids=op_id)
@settings(max_examples=120)
@given(data=st.data())
def test_any_broadcast_in_any_order(op: Op, device: torch.device, data: st.DataObject) -> None:
    dtype, param = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(op.forms))
    tensors = data.draw(operands(op, dtype, param, device))
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    event_ndim = data.draw(st.none() | st.integers(0, len(shape)))
    seed: Tensor | int = data.draw(st.integers(-(2**63), 2**63 - 1))
    if shape and data.draw(st.booleans()):
        seed = torch.arange(shape[0], device=device) * 977 - 5
    options = {"event_ndim": event_ndim, "seed": seed}
    results = op(fastvae, tensors, param, **options)
    assert_accurate(results, exact(op, tensors, param, **options), dtype)
    grads, upstream = gradients(op, tensors, param, **options)
    assert_accurate(grads, exact(op, tensors, param, upstream=upstream, **options), dtype)


def test_many_alternating_dimensions(device: torch.device) -> None:
    mu = torch.linspace(-1, 1, 256, device=device).view((2,) * 8)
    logvar = torch.linspace(-1, 1, 16, device=device).view((1, 2) * 4)
    op = next(op for op in OPS if op.name == "rsample_kl to N(0, I)")
    assert_accurate(op(fastvae, [mu, logvar]), exact(op, [mu, logvar]), torch.float32)
    grads, upstream = gradients(op, [mu, logvar])
    assert_accurate(grads, exact(op, [mu, logvar], upstream=upstream), torch.float32)
