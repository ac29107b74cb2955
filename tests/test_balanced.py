"""A KL divergence whose gradient is shared out, and products of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import reference

MODULES = pytest.mark.parametrize("module", [fastvae, reference], ids=["fused", "reference"])


def leaves(n: int, *shape: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(device)
    return [t.clone().requires_grad_() for t in tensors]


# ---- Balanced KL ---------------------------------------------------------------------------------


@MODULES
@pytest.mark.parametrize("balance", [0, 0.25, 0.8, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_it_stands_for(
    module: Any, balance: float, weighted: bool, device: torch.device
) -> None:
    q = leaves(4, 5, 3, 7, device=device)
    weight = torch.rand(7, device=device, dtype=torch.float64) if weighted else None
    found = module.balanced_kl_divergence(*q, balance=balance, weight=weight)
    mu, logvar, prior_mu, prior_logvar = q
    to_p = reference.kl_divergence(
        mu.detach(), logvar.detach(), prior_mu, prior_logvar, weight=weight
    )
    to_q = reference.kl_divergence(
        mu, logvar, prior_mu.detach(), prior_logvar.detach(), weight=weight
    )
    right = balance * to_p + (1 - balance) * to_q
    torch.testing.assert_close(found, right)
    g = torch.rand_like(right)
    torch.testing.assert_close(
        torch.autograd.grad(found, q, g), torch.autograd.grad(right, q, g), rtol=1e-9, atol=1e-9
    )


def test_another_balance_is_told_apart(device: torch.device) -> None:
    q = leaves(4, 5, 7, device=device)
    grads = [
        torch.autograd.grad(fastvae.balanced_kl_divergence(*q, balance=b).sum(), q)
        for b in (0.8, 0.79)
    ]
    for a, b in zip(*grads, strict=True):
        assert not torch.allclose(a, b, rtol=1e-4)


@MODULES
def test_free_nats_of_rows_and_of_the_mean(module: Any, device: torch.device) -> None:
    """Clipped row by row, what is below gets no gradient; clipped in the mean, all or none."""
    q = leaves(4, 6, 7, device=device)
    kl = module.balanced_kl_divergence(*q)
    least = kl.detach().median()
    (of_rows,) = torch.autograd.grad(kl.clamp(min=least).mean(), q[:1], retain_graph=True)
    assert torch.equal(of_rows.abs().sum(1) == 0, kl < least)
    (of_mean,) = torch.autograd.grad(kl.mean().clamp(min=2 * kl.mean().item()), q[:1])
    assert not of_mean.any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"balance": 1.5}, ValueError, "balance is 1.5; want 0 to 1"),
        ({"balance": -0.1}, ValueError, "balance is -0.1; want 0 to 1"),
        ({"balance": float("nan")}, ValueError, "balance is nan; want 0 to 1"),
        ({"prior_mu": None}, TypeError, "prior_mu is None; want a tensor or a number"),
    ],
    ids=str,
)
@MODULES
def test_rejects(
    options: dict[str, Any], error: type[Exception], message: str, module: Any
) -> None:
    t = torch.zeros(2, 3)
    arguments = {"mu": t, "logvar": t, "prior_mu": t, "prior_logvar": t, **options}
    with pytest.raises(error, match=message):
        module.balanced_kl_divergence(**arguments)


@pytest.mark.skipif(not fastvae.backend.native_enabled(), reason="needs the binary")
def test_the_kernel_wants_a_prior() -> None:
    t = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="prior_mu is missing"):
        torch.ops.fastvae.balanced_kl_divergence(t, t, None, None, None, 0.5, 0, -1, 1, None)


# ---- Products of experts -------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_the_product_is_that_of_precisions(prior: bool, masked: bool, device: torch.device) -> None:
    mu, logvar = leaves(2, 3, 4, 5, device=device)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]], device=device).bool()
    there = mask[..., None].double() if masked else torch.ones_like(mu)
    precision = (there * torch.exp(-logvar)).sum(0) + prior
    right = (there * mu * torch.exp(-logvar)).sum(0) / precision
    q = fastvae.product_of_experts(mu, logvar, mask if masked else None, prior=prior)
    torch.testing.assert_close(q.mean, right)
    torch.testing.assert_close(q.logvar, -precision.log())
    z, kl = q.rsample_kl(seed=3)
    same = fastvae.DiagonalGaussian(right, -precision.log())
    torch.testing.assert_close(z, same.rsample(seed=3))
    torch.testing.assert_close(kl, same.kl())
    for mine, want in zip(
        torch.autograd.grad(kl.sum(), (mu, logvar), retain_graph=True),
        torch.autograd.grad(same.kl().sum(), (mu, logvar)),
        strict=True,
    ):
        torch.testing.assert_close(mine, want)


def test_experts_that_are_not_there_may_hold_anything(device: torch.device) -> None:
    mu, logvar = (t.detach() for t in leaves(2, 3, 4, 5, device=device))
    mask = torch.tensor([True, False, True], device=device)
    dirty = [
        t.clone().index_fill(0, torch.tensor([1], device=device), torch.nan) for t in (mu, logvar)
    ]
    for t in dirty:
        t.requires_grad_()
    q = fastvae.product_of_experts(*dirty, mask)
    clean = fastvae.product_of_experts(mu[::2], logvar[::2])
    torch.testing.assert_close(q.mean, clean.mean)
    torch.testing.assert_close(q.logvar, clean.logvar)
    for grad in torch.autograd.grad(q.kl().sum(), dirty):
        assert grad.isfinite().all()
        assert not grad[1].any()


def test_experts_without_bounds(device: torch.device) -> None:
    """e^-lv overflows, and beside an epsilon a wide expert is lost."""
    mu = torch.tensor([[[1.0]], [[3.0]]], device=device)
    for lv in (-200.0, 200.0):
        q = fastvae.product_of_experts(mu, torch.full_like(mu, lv), prior=False)
        torch.testing.assert_close(q.mean.item(), 2.0)
        torch.testing.assert_close(q.logvar.item(), lv - torch.tensor(2.0).log().item())
    only_prior = fastvae.product_of_experts(mu, mu, torch.zeros(2, device=device))
    assert only_prior.mean.item() == only_prior.logvar.item() == 0


@pytest.mark.parametrize("shape", [(2,), (3, 5), (3, 4, 5, 1)], ids=str)
def test_masks_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mask has shape"):
        fastvae.product_of_experts(torch.zeros(3, 4, 5), torch.zeros(3, 4, 5), torch.ones(shape))
