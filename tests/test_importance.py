"""Estimates of ln p(x) against the exact value, and what they say about themselves."""

from __future__ import annotations

import math

import pytest
import torch
from models import FactorAnalysis, mlp

import fastvae
from fastvae.models.importance import _Weights, effective_sample_size, log_mean_exp


def test_importance_sampling(device: torch.device) -> None:
    toy = FactorAnalysis(device, n=50)
    exact = toy.model().log_likelihood(toy.x, 3, seed=0)
    torch.testing.assert_close(exact.value, toy.log_prob)
    assert exact.standard_error.max() < 1e-6
    torch.testing.assert_close(exact.effective_sample_size, torch.full_like(exact.value, 3))

    estimate = toy.model(exact=False).log_likelihood(toy.x, 4000, seed=0)
    assert (estimate.standard_error > 1e-4).all()
    error = (estimate.value - toy.log_prob) / estimate.standard_error
    assert error.abs().max() < 6
    assert 0.5 < error.square().mean().sqrt() < 1.6
    assert ((estimate.effective_sample_size >= 1) & (estimate.effective_sample_size < 4000)).all()


def test_the_prior_is_a_poor_proposal(device: torch.device) -> None:
    toy = FactorAnalysis(device, sigma=1.0)
    model = toy.model(exact=False)
    estimate = fastvae.prior_sampling(model, toy.x, 40_000, seed=0)
    error = (estimate.value - toy.log_prob) / estimate.standard_error
    assert error.abs().max() < 5
    again = fastvae.prior_sampling(model, toy.x[:2], 40_000, seed=0)
    torch.testing.assert_close(again.value, estimate.value[:2])  # the same z for every x
    by_q = model.log_likelihood(toy.x, 40_000, chunk=1000, seed=0)
    assert (by_q.effective_sample_size > 5 * estimate.effective_sample_size).all()
    sharp = FactorAnalysis(device, sigma=0.01)
    estimate = fastvae.prior_sampling(sharp.model(), sharp.x, 1000, seed=0)
    assert (estimate.effective_sample_size < 3).all()
    assert (estimate.value < sharp.log_prob - 10).all()


def test_sums_are_streamed() -> None:
    torch.manual_seed(0)
    log_w = 30 * torch.randn(64, 5, dtype=torch.float64) - 1000
    weights = _Weights()
    for part in log_w.split(7):
        weights.add(part)
    value, standard_error, ess = weights.result()
    torch.testing.assert_close(value, log_mean_exp(log_w))
    torch.testing.assert_close(ess, effective_sample_size(log_w))
    w = torch.exp(log_w - log_w.max(0).values)
    torch.testing.assert_close(ess, w.sum(0) ** 2 / (w**2).sum(0))
    torch.testing.assert_close(standard_error, w.std(0) / w.mean(0) / math.sqrt(64))


def test_memory_does_not_grow_with_samples(device: torch.device) -> None:
    model, x = mlp(device)
    rows = []
    model.decoder.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    model.log_likelihood(x, 50, chunk=8)
    assert rows == [8 * len(x)] * 6 + [2 * len(x)]
    for call in (model.log_likelihood, lambda *a, **k: fastvae.prior_sampling(model, *a, **k)):
        first, again = (call(x, 20, chunk=8, seed=3).value for _ in "ab")
        assert torch.equal(first, again)
        generator = torch.Generator(device).manual_seed(3)
        torch.testing.assert_close(call(x, 20, chunk=8, generator=generator).value, first)
        assert not torch.equal(call(x, 20, chunk=8, seed=4).value, first)
        with pytest.raises(ValueError, match="n_samples is 0; want at least 1"):
            call(x, 0)
        with pytest.raises(ValueError, match="chunk is 0; want at least 1"):
            call(x, 5, chunk=0)
        with pytest.raises(ValueError, match="seed and generator are both given"):
            call(x, 5, seed=0, generator=generator)
    assert not model.log_likelihood(x, 2).value.requires_grad


def test_weights_are_what_they_say(device: torch.device) -> None:
    model, x = mlp(device, likelihood=fastvae.Bernoulli())
    weights = fastvae.log_weights(model, x, 4, seed=0)
    q = model.encode(x)
    torch.testing.assert_close(weights.z, q.rsample((4,), seed=0))
    torch.testing.assert_close(
        weights.log_ratio, model.prior.log_prob(weights.z) - q.log_prob(weights.z)
    )
    decoded = torch.stack([model.decoder(z) for z in weights.z])
    torch.testing.assert_close(weights.decoded, decoded)
    want = torch.stack([model.likelihood.log_prob(x, each) for each in decoded])
    torch.testing.assert_close(weights.log_likelihood, want)
    torch.testing.assert_close(weights.total, want + weights.log_ratio)
