"""Where seeds come from: `torch.manual_seed`, generators, `draw_seed` and ints."""

from __future__ import annotations

import pytest
import torch
from accuracy import normals
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


def generators(*seeds: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("backend", ["native", "reference", "eager"])
def test_a_generator_for_each_example(backend: str, device: torch.device) -> None:
    """An example's noise is its generator's, in whatever batch it is."""
    mu, logvar = torch.randn(2, 3, 6, device=device)
    kinds = ((fastvae.rsample, {}), (fastvae.rsample, {"sample_shape": (2,)}))
    with fastvae.use_backend(backend):
        for function, options in kinds:
            many = generators(5, 6, 7, device=device)
            z = function(mu, logvar, generator=many, **options)
            for k in range(3):
                alone = function(
                    mu[k : k + 1],
                    logvar[k : k + 1],
                    generator=generators(5 + k, 0, device=device)[:1],
                    **options,
                )
                if backend != "eager":  # whose single generator is PyTorch's own noise
                    torch.testing.assert_close(z[..., k : k + 1, :], alone)
            swapped = function(
                mu[[1, 0, 2]],
                logvar[[1, 0, 2]],
                generator=generators(6, 5, 7, device=device),
                **options,
            )
            torch.testing.assert_close(swapped[..., [1, 0, 2], :], z)
            again = function(mu, logvar, generator=many, **options)
            assert not torch.isclose(again, z).any()  # each has moved on
        kl = fastvae.rsample_kl(mu, logvar, generator=generators(5, 6, 7, device=device))
        z = fastvae.rsample(mu, logvar, generator=generators(5, 6, 7, device=device))
        torch.testing.assert_close(kl[0], z)


def test_a_list_of_one_generator_is_that_generator(device: torch.device) -> None:
    mu = torch.zeros(4, 6, device=device)
    one, listed = (generators(3, device=device) for _ in range(2))
    assert torch.equal(
        fastvae.rsample(mu, 0.0, generator=one[0]), fastvae.rsample(mu, 0.0, generator=listed)
    )


@pytest.mark.parametrize("other", ["meta", "cuda"])
def test_a_generator_of_the_cpu_beside_another_device(other: str) -> None:
    if other == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    mu = torch.zeros(4, 6, device=other)
    right, count = torch.Generator().manual_seed(3), 2
    for generator in (generators(3)[0], generators(3, 4, 5, 6)):
        z, kl = fastvae.rsample_kl(mu, 0.0, generator=generator)
        assert z.device.type == kl.device.type == other
        first = generator[0] if isinstance(generator, list) else generator
        fastvae.draw_seed(right.manual_seed(3))
        assert torch.equal(first.get_state(), right.get_state())  # one seed was drawn, from it
    if other == "cuda":  # the noise of the seeds that a CPU tensor has
        z = fastvae.rsample(mu, 0.0, generator=generators(3)[0], sample_shape=(count,))
        cpu = fastvae.rsample(mu.cpu(), 0.0, generator=generators(3)[0], sample_shape=(count,))
        torch.testing.assert_close(z.cpu(), cpu)
    assert fastvae.draw_seed(generators(3)[0], other).device.type == other


def test_bad_generators() -> None:
    mu = torch.zeros(3, 4)
    for given, kind, message in (
        (generators(1, 2), ValueError, "^generator is a list of 2; want 3, one for each row$"),
        ([], ValueError, "^generator is a list of 0; want 3"),
        ([*generators(1, 2), 3], TypeError, "^generator holds a int; want torch.Generators$"),
        ("cpu", TypeError, "^generator is a str; want a torch.Generator or a list of them$"),
    ):
        with pytest.raises(kind, match=message):
            fastvae.rsample(mu, 0.0, generator=given)
    with pytest.raises(ValueError, match="want one generator, there are no rows"):
        fastvae.rsample(torch.zeros(()), 0.0, generator=generators(1, 2))
