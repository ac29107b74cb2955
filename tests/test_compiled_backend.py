"""`use_backend("compiled")`: the definitions by torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.testing import assert_close

import fastvae
from fastvae.ops.op import OPS as DECLARED


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with fastvae.use_backend("compiled"):
        yield


def test_one_graph_serves_all_batches() -> None:
    torch._dynamo.utils.counters.clear()
    for rows in (8, 5, 3, 7):
        x, mean = torch.randn(rows, 6), torch.randn(rows, 6, requires_grad=True)
        value = fastvae.gaussian_log_prob(x, mean, 0.3)
        right = fastvae.reference.gaussian_log_prob(x, mean, 0.3)
        assert_close(value, right)
        slopes = (torch.autograd.grad(y.sum(), mean) for y in (value, right))
        assert_close(*slopes)
    # But the first, which is taken as it is.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_noise_is_the_kernels() -> None:
    leaves = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    seed = fastvae.draw_seed(torch.Generator().manual_seed(3))
    found = fastvae.rsample_kl(*leaves, generator=torch.Generator().manual_seed(3))
    with fastvae.use_backend("native"):
        right = fastvae.rsample_kl(*leaves, seed=seed)
    slopes = (torch.autograd.grad(z.sum() + kl.sum(), leaves) for z, kl in (found, right))
    assert_close(found, right, rtol=1e-6, atol=2e-6)
    assert_close(*slopes, rtol=1e-5, atol=1e-5)


def test_inside_of_a_compiled_function_and_of_a_transform() -> None:
    mu = torch.randn(4, 6)

    def rate(mu: torch.Tensor) -> torch.Tensor:
        return fastvae.kl_divergence(mu, 0.5)

    right = fastvae.reference.kl_divergence(mu, 0.5)
    assert_close(torch.compile(rate, fullgraph=True, backend="aot_eager")(mu), right)
    slopes = torch.func.grad(lambda mu: rate(mu).sum())(mu)
    assert_close(slopes, mu)


def test_each_op_has_a_code_of_its_own() -> None:
    """Dynamo compiles a code a limited number of times."""
    codes = {id(op._compiled._torchdynamo_orig_callable.__code__) for op in DECLARED.values()}
    assert len(codes) == len(DECLARED)
