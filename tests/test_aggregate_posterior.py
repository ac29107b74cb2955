"""ln q(z) of the aggregate posterior, from a batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from accuracy import seeded
from test_mixtures import components

import fastvae

pytestmark = pytest.mark.usefixtures("on_device")


def test_whole_data_set_is_exact() -> None:
    z, mu, logvar, _ = components(30, 30, 4, dtype=torch.float64)
    joint, marginals = fastvae.aggregate_log_prob(z, mu, logvar)
    normal = torch.distributions.Normal(mu, (logvar / 2).exp())
    of_each = normal.log_prob(z.unsqueeze(1))
    torch.testing.assert_close(joint, of_each.sum(-1).logsumexp(1) - math.log(30))
    torch.testing.assert_close(marginals, (of_each.logsumexp(1) - math.log(30)).sum(-1))


def test_stratified_sampling_is_unbiased() -> None:
    """Over all batches that hold row 0, of a data set small enough to go through."""
    n, batch = 8, 4
    z, mu, logvar, _ = components(n, n, 3, dtype=torch.float64)
    normal = torch.distributions.Normal(mu, (logvar / 2).exp())
    density = normal.log_prob(z[0]).exp()
    found = []
    for others in itertools.combinations(range(1, n), batch - 1):
        index = [0, *others]
        joint, _ = fastvae.aggregate_log_prob(z[index], mu[index], logvar[index], dataset_size=n)
        found.append(joint[0].exp())
    torch.testing.assert_close(torch.stack(found).mean(), density.prod(-1).mean())
    of_weighted = fastvae.aggregate_log_prob(
        z[:4], mu[:4], logvar[:4], dataset_size=n, estimator="mws"
    )[0]
    torch.testing.assert_close(
        of_weighted[0], normal.log_prob(z[0]).sum(-1)[:4].logsumexp(0) - math.log(n * batch)
    )


def test_total_correlation_of_a_batch() -> None:
    """N = 5000 posteriors of a correlated Gaussian, 64 at a time: near the exact value, where the
    weights in a column, or counted once for each dimension, are far from it."""
    n, batch, size = 5000, 64, 10
    generator = seeded(0)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64) / 2
    mu = torch.randn(n, size, generator=generator, dtype=torch.float64) @ factor
    logvar = torch.full_like(mu, math.log(0.3**2))
    z = mu + 0.3 * torch.randn(n, size, generator=generator, dtype=torch.float64)
    joint, marginals = fastvae.aggregate_log_prob(z, mu, logvar)
    right = (joint - marginals).mean()
    found = []
    for index in torch.randperm(n, generator=generator).split(batch)[:-1]:
        joint, marginals = fastvae.aggregate_log_prob(
            z[index], mu[index], logvar[index], dataset_size=n
        )
        found.append((joint - marginals).mean())
    assert (torch.stack(found).mean() - right).abs() < 0.15 * right
