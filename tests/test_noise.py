"""The noise stream: what it is, and that it depends on (seed, row, column, sample) alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from accuracy import normals, same_bits
from cases import DTYPES, LAYOUT_SHAPE, LAYOUTS
from torch import Tensor

import fastvae
from fastvae import _C, reference

ONES = 0xFFFFFFFF


# ---- What it is ----------------------------------------------------------------------------------


KNOWN = {  # counter, key -> words, of Random123's kat_vectors
    ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ((ONES,) * 4, (ONES,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ),
}


@pytest.mark.parametrize(("counter_and_key", "words"), KNOWN.items())
def test_known_answers(counter_and_key: tuple, words: tuple) -> None:
    counter, key = counter_and_key
    assert _C._philox_words(*counter, *key) == words
    tensors = reference.philox([*map(torch.tensor, counter)], *map(torch.tensor, key))
    assert tuple(t.item() for t in tensors) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 0x299F31D0A4093822, -(2**63), 2**63 - 1])
def test_every_normal_stands_where_the_contract_says(seed: int, device: torch.device) -> None:
    rows, columns, samples = 3, 13, 2
    z = normals(rows, columns, seed=seed, sample_shape=(samples,), device=device).cpu()
    key = seed & ONES, seed >> 32 & ONES
    for sample in range(samples):
        for row in range(rows):
            for column in range(columns):
                words = _C._philox_words(column // 4, row, 0, sample, *key)
                pair = column % 4 // 2
                eps = _C._box_muller(*words[2 * pair : 2 * pair + 2])[column % 2]
                assert z[sample, row, column].item() == eps


def test_columns_are_counted_in_logical_order(device: torch.device) -> None:
    flat = normals(3, 4 * 5 * 6, device=device)
    assert torch.equal(normals(3, 4, 5, 6, device=device).flatten(1), flat)
    assert torch.equal(normals(3, 1, 120, device=device).flatten(1), flat)


def test_a_vector_is_one_column_of_rows(device: torch.device) -> None:
    assert torch.equal(normals(9, device=device), normals(9, 1, device=device)[:, 0])
    assert torch.equal(normals(device=device), normals(1, 1, device=device)[0, 0])


def test_kernels_and_reference_draw_the_same_normals(device: torch.device) -> None:
    for shape, sample_shape in (((200, 501), ()), ((7, 3, 5), (2, 3)), ((1, 200001), ())):
        for seed in (torch.tensor(-5), torch.arange(shape[0]) * 2**40 - 3):
            seed = seed.to(device)
            ours = normals(*shape, seed=seed, sample_shape=sample_shape, device=device)
            theirs = reference.noise(seed, torch.Size(shape), sample_shape=sample_shape)
            ulp = torch.nextafter(theirs.abs(), theirs.new_tensor(torch.inf)) - theirs.abs()
            assert ((ours.double() - theirs.double()).abs() / ulp).max() <= 4


def test_reference_ops_draw_the_noise_of_reference_noise(device: torch.device) -> None:
    seed = torch.tensor(3, device=device)
    z = reference.rsample(torch.zeros(4, 6, device=device), 1.0, param="std", seed=seed)
    assert torch.equal(z, reference.noise(seed, torch.Size((4, 6))))


# ---- What it does not depend on ------------------------------------------------------------------


def test_threads(threads: None) -> None:
    draws = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        draws.append([normals(2, 100003), normals(3001, 33), normals(50, 40, sample_shape=(30,))])
    for one, other in pairwise(draws):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("seed", [7, torch.arange(LAYOUT_SHAPE[0]) - 1], ids=["one", "per row"])
def test_memory_layout(layout: object, seed: Tensor | int, device: torch.device) -> None:
    seed = seed.to(device) if isinstance(seed, Tensor) else seed
    mu = torch.zeros(LAYOUT_SHAPE, device=device)
    for sample_shape in ((), (3,)):
        expected = normals(*LAYOUT_SHAPE, seed=seed, sample_shape=sample_shape, device=device)
        z = fastvae.rsample(
            layout(mu), layout(mu + 1), param="std", seed=seed, sample_shape=sample_shape
        )
        assert torch.equal(z, expected)


def test_cutting_a_batch_under_seeds_of_its_rows(device: torch.device) -> None:
    seed = fastvae.draw_seed(torch.Generator(device).manual_seed(1), batch=11)
    whole = normals(11, 3, 7, seed=seed, device=device)
    for cut in range(1, 11):
        first = normals(cut, 3, 7, seed=seed[:cut], device=device)
        second = normals(11 - cut, 3, 7, seed=seed[cut:], device=device)
        assert torch.equal(torch.cat([first, second]), whole)
    shuffle = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(normals(11, 3, 7, seed=seed[shuffle], device=device), whole[shuffle])


@pytest.mark.parametrize(
    "shape", [(513,), (1025, 1), (40, 3), (3, 600), (2, 1030), (5, 2, 3)], ids=str
)
def test_a_row_under_its_seed_is_that_row_alone(
    shape: tuple[int, ...], device: torch.device
) -> None:
    seed = torch.arange(shape[0], device=device) * 3 - 40
    for sample_shape in ((), (2,)):
        whole = normals(*shape, seed=seed, sample_shape=sample_shape, device=device)
        for row in (0, 1, shape[0] // 2, shape[0] - 1):
            alone = normals(1, *shape[1:], seed=seed[row], sample_shape=sample_shape, device=device)
            assert torch.equal(whole.narrow(len(sample_shape), row, 1), alone)


def test_more_rows_or_samples_never_change_the_first(device: torch.device) -> None:
    one = normals(5, 9, device=device)
    assert torch.equal(normals(8, 9, device=device)[:5], one)
    more = normals(5, 9, sample_shape=(6,), device=device)
    assert torch.equal(more[0], one)
    assert torch.equal(normals(5, 9, sample_shape=(4,), device=device), more[:4])
    assert torch.equal(normals(5, 9, sample_shape=(2, 3), device=device).flatten(0, 1), more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(dtype: torch.dtype, device: torch.device) -> None:
    for module in (fastvae, reference):
        z, z32 = (
            module.rsample(torch.zeros(9, 40, dtype=d, device=device), 1.0, param="std", seed=7)
            for d in (dtype, torch.float32)
        )
        assert torch.equal(z, z32.to(dtype))


def test_op_and_parameterization(device: torch.device) -> None:
    eps = normals(9, 40, device=device)
    zero, one = torch.zeros(9, 40, device=device), torch.ones(9, 40, device=device)
    for param, s in (("std", one), ("var", one), ("logvar", zero), ("log_std", zero)):
        assert same_bits(fastvae.rsample(zero, s, param=param, seed=7), eps)
        for event_ndim in (0, 1, 2):
            z, _ = fastvae.rsample_kl(zero, s, param=param, event_ndim=event_ndim, seed=7)
            assert same_bits(z, eps)
            z, _ = fastvae.rsample_kl(zero, s, zero, s, param=param, seed=7, event_ndim=event_ndim)
            assert same_bits(z, eps)


def test_backward_draws_the_noise_of_forward(device: torch.device) -> None:
    eps = normals(9, 40, device=device)
    mu = torch.zeros(9, 40, device=device)
    std = torch.ones(9, 40, device=device, requires_grad=True)
    for z in (
        fastvae.rsample(mu, std, param="std", seed=7),
        fastvae.rsample_kl(mu, std, param="std", seed=7)[0],
    ):
        (grad,) = torch.autograd.grad(z.sum(), std)
        assert torch.equal(grad, eps)


def test_device(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("compares another device with the CPU")
    for shape in ((2, 100003), (3001, 33), (5, 6, 7, 8)):
        assert torch.equal(normals(*shape, device=device).cpu(), normals(*shape))
