"""Where seeds come from: `torch.manual_seed`, generators, `draw_seed` and ints."""

from __future__ import annotations

import pytest
import torch
from cases import normals
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae import reference


@pytest.mark.parametrize("module", [fastvae, reference], ids=["native", "reference"])
def test_manual_seed_and_generator(module: object, device: torch.device) -> None:
    mu = torch.zeros(4, 6, device=device)

    def draw(**options: object) -> Tensor:
        return torch.cat(
            [module.rsample(mu, mu, **options), module.rsample_kl(mu, mu, **options)[0]]
        )

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)
    assert not torch.equal(first[:4], first[4:])

    generator = torch.Generator(device)
    state = torch.get_rng_state()
    third = draw(generator=generator.manual_seed(5))
    assert torch.equal(draw(generator=generator.manual_seed(5)), third)
    assert not torch.equal(draw(generator=generator), third)
    assert torch.equal(torch.get_rng_state(), state)


def test_both_backends_consume_the_generator_alike(device: torch.device) -> None:
    mu = torch.zeros(4, 6, device=device)
    draws = []
    for backend in ("native", "reference"):
        torch.manual_seed(3)
        with fastvae.use_backend(backend):
            draws.append(torch.stack([fastvae.rsample(mu, mu) for _ in range(3)]))
    assert torch.allclose(*draws, rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_noise_again(
    use_reentrant: bool, device: torch.device
) -> None:
    mu = torch.zeros(4, 6, device=device)
    std = torch.ones(4, 6, device=device, requires_grad=True)

    def run(std: Tensor) -> Tensor:
        return fastvae.rsample(mu, std, param="std") ** 2

    z_squared = checkpoint(run, std, use_reentrant=use_reentrant)
    z_squared.sum().backward()
    torch.testing.assert_close(std.grad, 2 * z_squared)


def test_draw_seed(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    one = fastvae.draw_seed(generator)
    assert (one.shape, one.dtype, one.device.type) == ((), torch.int64, device.type)
    assert fastvae.draw_seed(generator, batch=0).shape == (0,)
    many = fastvae.draw_seed(generator, device, batch=1000)
    assert len(many.unique()) == 1000
    assert torch.equal(fastvae.draw_seed(generator.manual_seed(1)), one)
    assert fastvae.draw_seed(device=device, batch=3).device.type == device.type
    assert fastvae.draw_seed().shape == ()


def test_an_int_seed_is_its_tensor(device: torch.device) -> None:
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        tensor = torch.tensor(seed, device=device)
        assert torch.equal(
            normals(3, 5, seed=seed, device=device), normals(3, 5, seed=tensor, device=device)
        )
