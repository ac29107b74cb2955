"""Autocast, half types and GradScaler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastvae

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("half", HALF, ids=str)
def test_autocast_takes_half_layers_and_float32_data(
    half: torch.dtype, device: torch.device
) -> None:
    """The usual step, unchanged: layers give half types, the data stay float32."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(12, 6, device=device), nn.Linear(3, 12, device=device)
    log_sigma = nn.Parameter(torch.zeros((), device=device))
    x = torch.rand(8, 12, device=device)

    def step() -> tuple[Tensor, ...]:
        mu, logvar = encoder(x).chunk(2, 1)
        z, kl = fastvae.rsample_kl(mu, logvar, seed=1)
        decoded = decoder(z)
        log_prob = fastvae.gaussian_log_prob(x, decoded, log_sigma, param="log_std")
        return mu, z, decoded, kl, log_prob

    parameters = [*encoder.parameters(), *decoder.parameters(), log_sigma]
    with torch.autocast(device.type, half):
        mu, z, decoded, kl, log_prob = step()
    assert mu.dtype == z.dtype == decoded.dtype == half
    assert kl.dtype == log_prob.dtype == torch.float32
    grads = torch.autograd.grad((kl - log_prob).mean(), parameters)
    *_, full_kl, full_log_prob = step()
    right = torch.autograd.grad((full_kl - full_log_prob).mean(), parameters)
    assert_close(kl, full_kl, rtol=0.05, atol=0.05)
    assert_close(log_prob, full_log_prob, rtol=0.05, atol=0.05)
    assert_close(grads, right, rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_widest_dtype_is_taken(autocast: bool, device: torch.device) -> None:
    x, mean = torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device).bfloat16()
    double = x.double()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        assert fastvae.rsample(x, mean).dtype == torch.float32
        assert fastvae.rsample(mean, mean).dtype == torch.bfloat16
        assert fastvae.rsample(mean, mean.half()).dtype == torch.float32
        assert fastvae.rsample(mean, double).dtype == torch.float64
        assert fastvae.gaussian_log_prob(double, mean).dtype == torch.float64
    assert fastvae.reference.rsample(x, mean).dtype == torch.float32


@pytest.mark.parametrize("whole", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_whole_numbers_count_as_float32(whole: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([[0, 1, 1], [1, 0, 200]], device=device).to(whole)
    mean = torch.randn(2, 3, device=device, requires_grad=True)
    for of_mean in (mean, mean.double(), mean.bfloat16()):
        want = fastvae.gaussian_log_prob(x.double(), of_mean.double(), 0.5)
        got = fastvae.gaussian_log_prob(x, of_mean, 0.5)
        assert got.dtype == torch.promote_types(of_mean.dtype, torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    fastvae.gaussian_log_prob(x, mean.bfloat16()).sum().backward()
    assert mean.grad.dtype == torch.float32
    assert fastvae.kl_divergence(x, x).dtype == torch.float32
    assert fastvae.DiagonalGaussian.from_params(x.expand(2, 2, 3)).kl().dtype == torch.float32


@pytest.mark.parametrize("half", HALF, ids=str)
def test_dtypes_of_results(half: torch.dtype, device: torch.device) -> None:
    """Samples have their inputs' dtype, sums and gradients of row values are float32."""
    mu, logvar = (torch.randn(4, 6, device=device).to(half).requires_grad_() for _ in range(2))
    z, kl = fastvae.rsample_kl(mu, logvar)
    log_prob = fastvae.gaussian_log_prob(z, mu)
    assert (z.dtype, kl.dtype, log_prob.dtype) == (half, torch.float32, torch.float32)
    (kl.sum() + log_prob.sum()).backward()
    assert mu.grad.dtype == logvar.grad.dtype == half


def test_grad_scaler(device: torch.device) -> None:
    """Scaled and unscaled float16 training takes the same steps; one overflow skips its step."""
    torch.manual_seed(0)
    x = torch.rand(8, 12, device=device)
    results = []
    for scale in (1.0, 256.0):
        torch.manual_seed(0)
        encoder = nn.Linear(12, 6, device=device)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=1000)
        for seed in range(5):
            with torch.autocast(device.type, torch.float16):
                z, kl = fastvae.rsample_kl(*encoder(x).chunk(2, 1), seed=seed)
                loss = (kl - fastvae.gaussian_log_prob(z, 0.5)).mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == scale
        results.append(encoder.weight.detach().clone())
    assert_close(*results, rtol=1e-2, atol=1e-3)

    before = encoder.weight.detach().clone()
    with torch.autocast(device.type, torch.float16):
        loss = fastvae.rsample_kl(*(encoder(x) * 1e5).chunk(2, 1))[1].mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(encoder.weight, before)
    assert scaler.get_scale() < scale
