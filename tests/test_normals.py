"""The noise is normal: its distribution, its tails, and Box-Muller's own error."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from accuracy import normals

from fastvae import _C, reference

mpmath = pytest.importorskip("mpmath")
stats = pytest.importorskip("scipy.stats")

ONES = 0xFFFFFFFF
MANY = 1 << 21


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    return normals(64, MANY // 64, seed=1).flatten().numpy()


def test_moments(draws: np.ndarray) -> None:
    x = draws.astype(np.float64)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((x**power).mean() - moment) < 4 * (variance / MANY) ** 0.5


def test_kolmogorov_smirnov(draws: np.ndarray) -> None:
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    for offset in range(4):  # each of the four normals of a counter
        assert stats.kstest(draws[offset::4], "norm").pvalue > 1e-3


def test_kolmogorov_smirnov_rejects_a_scale_a_little_off(draws: np.ndarray) -> None:
    assert stats.kstest(draws * 1.005, "norm").pvalue < 1e-3


def test_tails(draws: np.ndarray) -> None:
    for threshold in (2, 3, 4, 4.5):
        expected = MANY * stats.norm.sf(threshold)
        for count in ((draws > threshold).sum(), (draws < -threshold).sum()):
            assert abs(count - expected) < 4 * expected**0.5


def test_small_normals_are_as_fine_as_floats(draws: np.ndarray) -> None:
    assert not (draws == 0).any()
    expected = MANY * 2e-3 * stats.norm.pdf(0)
    assert abs((np.abs(draws) < 1e-3).sum() - expected) < 4 * expected**0.5
    small = np.sort(np.abs(draws))[:1000]
    assert len(np.unique(small)) > 990


def test_neighbours_are_independent(draws: np.ndarray) -> None:
    x = draws.reshape(64, -1).astype(np.float64)
    limit = 4 / MANY**0.5
    for a, b in (
        *((x[:, :-lag], x[:, lag:]) for lag in (1, 2, 3, 4, 8, 16)),  # columns
        (x[:-1], x[1:]),  # rows
        (x[:-1] ** 2 - 1, (x[1:] ** 2 - 1) / 2),
        (x[:, 0::2] ** 2 - 1, (x[:, 1::2] ** 2 - 1) / 2),  # a Box-Muller pair shares its radius
    ):
        assert abs((a * b).mean()) < limit * (MANY / a.size) ** 0.5
    samples = normals(64, 4096, seed=1, sample_shape=(2,)).double()
    seeds = normals(64, 4096, seed=2).double()
    assert abs((samples[0] * samples[1]).mean()) < 4 / 512
    assert abs((samples[0] * seeds).mean()) < 4 / 512


# ---- Box-Muller ----------------------------------------------------------------------------------


def test_the_ends_of_the_uniform() -> None:
    def radius(word: int) -> float:
        return float(np.hypot(*(np.float64(x) for x in _C._box_muller(word, 0x12345678))))

    assert radius(0) > 6.5  # the smallest uniform
    assert radius(0) == pytest.approx((2 * 33 * np.log(2)) ** 0.5, rel=1e-6)
    # The largest is 1 - 2^-33, the radius then (2 * 2^-33)^(1/2).
    assert radius(ONES) == pytest.approx(2.0**-16, rel=1e-6)
    # Next to the middle the two ways of taking the logarithm meet.
    assert radius(0x7FFFFFFF) == pytest.approx((2 * np.log(2)) ** 0.5, rel=1e-6)
    assert radius(0x80000000) == pytest.approx((2 * np.log(2)) ** 0.5, rel=1e-6)


def box_muller_words() -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    edges = [0, 1, 2, 3, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, ONES - 1, ONES]
    return [*product(edges, edges), *map(tuple, rng.integers(0, 2**32, (5000, 2)).tolist())]


def errors_of_box_muller(results: np.ndarray) -> np.ndarray:
    """Against 40 digits, in units in the last place."""
    with mpmath.workdps(40):
        right = []
        for a, b in box_muller_words():
            u, v = ((mpmath.mpf(word) + 0.5) / 2**32 for word in (a, b))
            radius = mpmath.sqrt(-2 * mpmath.log(u))
            right.append([float(radius * f(2 * v)) for f in (mpmath.cospi, mpmath.sinpi)])
    return np.abs(results - np.array(right)) / np.spacing(np.abs(np.array(right, np.float32)))


def test_box_muller_of_the_kernels() -> None:
    results = np.array([_C._box_muller(a, b) for a, b in box_muller_words()])
    assert errors_of_box_muller(results).max() < 5


def test_box_muller_of_the_reference() -> None:
    a, b = torch.tensor(box_muller_words()).T
    results = torch.stack(reference.box_muller(a, b), dim=1).double().numpy()
    assert errors_of_box_muller(results).max() < 1
