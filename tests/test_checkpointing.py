"""Activation checkpointing, and where noise comes from in a run that stops and goes on."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from models import mlp
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastvae


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def noise_matches(run, std: Tensor, **options: object) -> bool:
    """z = std eps squared: its gradient 2 z eps tells which noise backward used."""
    z_squared = checkpoint(run, std, use_reentrant=False, **options)
    (grad,) = torch.autograd.grad(z_squared.sum(), std)
    return torch.allclose(grad * std, 2 * z_squared, rtol=1e-5)


def drawing(std: Tensor) -> Tensor:
    return fastvae.rsample(0.0, std, param="std") ** 2


@pytest.fixture
def std(device: torch.device) -> Tensor:
    return torch.full((4, 6), 1.5, device=device, requires_grad=True)


def test_the_state_of_the_generator_is_preserved(std: Tensor) -> None:
    assert noise_matches(drawing, std)


def test_without_the_state_a_seed_from_outside_serves(std: Tensor) -> None:
    seed = fastvae.draw_seed(device=std.device)

    def seeded(std: Tensor) -> Tensor:
        return fastvae.rsample(0.0, std, param="std", seed=seed) ** 2

    assert noise_matches(seeded, std, preserve_rng_state=False)
    assert not noise_matches(drawing, std, preserve_rng_state=False)  # the negative control


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_checkpointing(backend: str, std: Tensor) -> None:
    seed = fastvae.draw_seed(device=std.device)

    def seeded(std: Tensor) -> Tensor:
        return fastvae.rsample(0.0, std, param="std", seed=seed) ** 2

    for run in (drawing, seeded):
        compiled = torch.compile(
            lambda std, run=run: checkpoint(run, std, use_reentrant=False),
            backend=backend,
            fullgraph=True,
        )
        z_squared = compiled(std)
        (grad,) = torch.autograd.grad(z_squared.sum(), std)
        assert_close(grad * std, 2 * z_squared)


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_a_memory_budget_recomputes_the_same_noise(budget: float, device: torch.device) -> None:
    model, x = mlp(device)
    seed = fastvae.draw_seed(device=device)
    right = torch.autograd.grad(model(x, seed=seed).loss, list(model.parameters()))
    with functorch_config.patch(activation_memory_budget=budget):
        compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
        found = torch.autograd.grad(compiled(x, seed=seed).loss, list(model.parameters()))
        # Drawn inside, PyTorch would draw it again in backward, and other numbers.
        with pytest.raises(Exception, match=r"want seed=fastvae.draw_seed"):
            compiled(x)
    assert_close(found, right)


# ---- Runs ----------------------------------------------------------------------------------------


def test_fork_rng(device: torch.device) -> None:
    mu = torch.zeros(4, 6, device=device)
    devices = [device] if device.type == "cuda" else []
    torch.manual_seed(3)
    right = fastvae.rsample(mu, 0.0)
    torch.manual_seed(3)
    with torch.random.fork_rng(devices):
        torch.manual_seed(99)
        assert not torch.equal(fastvae.rsample(mu, 0.0), right)
    assert torch.equal(fastvae.rsample(mu, 0.0), right)


def test_a_resumed_run_is_bit_identical(device: torch.device) -> None:
    """Weights, optimizer and generator saved after three steps and loaded elsewhere."""

    def steps(model: fastvae.VAE, optimizer: torch.optim.Optimizer, n: int) -> list[float]:
        losses = []
        for _ in range(n):
            optimizer.zero_grad()
            loss = model(x).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, x = mlp(device)
    optimizer = torch.optim.Adam(model.parameters())
    torch.manual_seed(7)
    steps(model, optimizer, 3)
    buffer = io.BytesIO()
    rng = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    torch.save([model.state_dict(), optimizer.state_dict(), rng], buffer)
    right = steps(model, optimizer, 3)

    buffer.seek(0)
    weights, moments, rng = torch.load(buffer, weights_only=True)
    twin, _ = mlp(device)
    optimizer = torch.optim.Adam(twin.parameters())
    twin.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    (torch.cuda if device.type == "cuda" else torch).set_rng_state(rng)
    assert steps(twin, optimizer, 3) == right


def test_ranks_draw_different_noise_or_that_of_one(device: torch.device) -> None:
    """From one base seed: each rank its own, or each its rows of what one process draws."""
    mu = torch.zeros(8, 5, device=device)
    base = 12345
    different = [fastvae.rsample(mu[:4], 0.0, seed=base + rank) for rank in range(2)]
    assert not torch.isclose(*different).any()

    seeds = fastvae.draw_seed(torch.Generator(device).manual_seed(base), batch=8)
    whole = fastvae.rsample(mu, 0.0, seed=seeds)
    shards = [
        fastvae.rsample(rows, 0.0, seed=own)
        for rows, own in zip(mu.chunk(2), seeds.chunk(2), strict=True)
    ]
    assert torch.equal(torch.cat(shards), whole)
