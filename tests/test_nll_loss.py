"""The loss whose gradient is made in forward: the same as the plain one, however it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import reference

Arguments = dict[str, Any]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALES = ("number", "learned", "channel", "element")


def make_arguments(scale: str, dtype: torch.dtype, device: torch.device) -> Arguments:
    """x, mean and logvar for a batch of 5 images of 3 channels; odd sizes."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        return values.requires_grad_()

    shapes = {"learned": (), "channel": (3, 1, 1), "element": (5, 3, 7, 9)}
    logvar = -1.5 if scale == "number" else leaf(*shapes[scale])
    return {"x": leaf(5, 3, 7, 9), "mean": leaf(5, 3, 7, 9), "logvar": logvar}


def gradients(loss: Tensor, arguments: Arguments, **options: Any) -> list[Tensor]:
    leaves = [value for value in arguments.values() if isinstance(value, Tensor)]
    return list(torch.autograd.grad(loss, leaves, **options))


def close(dtype: torch.dtype) -> dict[str, float]:
    rounding = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
    return {"rtol": rounding.get(dtype, 1e-12), "atol": rounding.get(dtype, 1e-12) * 1e-2}


def wide(arguments: Arguments) -> Arguments:
    return {
        name: value.detach().double().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference_in_float64(
    dtype: torch.dtype, scale: str, reduction: str, device: torch.device
) -> None:
    arguments = make_arguments(scale, dtype, device)
    exact = wide(arguments)
    loss = fastvae.gaussian_nll_loss(**arguments, reduction=reduction)
    right = reference.gaussian_nll_loss(**exact, reduction=reduction)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    for found, want in zip(gradients(loss, arguments), gradients(right, exact), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, **close(dtype))


def passes(loss: Callable[[], Tensor], arguments: Arguments) -> list[str]:
    """The kernels that ran, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(loss(), arguments)
    names = [event.name for event in profile.events()]
    return [name.removeprefix("fastvae::") for name in names if name.startswith("fastvae::g")]


def test_takes_one_pass(device: torch.device) -> None:
    """Without this, all the others could pass by way of the ordinary backward."""
    if not fastvae.ops.has_kernels(torch.empty(0, device=device)):
        pytest.skip("no kernels")
    arguments = make_arguments("element", torch.float32, device)
    one = passes(lambda: fastvae.gaussian_nll_loss(**arguments), arguments)
    assert one == ["gaussian_log_prob_with_grad"]
    two = passes(lambda: -fastvae.gaussian_log_prob(**arguments).mean(), arguments)
    assert two == ["gaussian_log_prob", "gaussian_log_prob_backward"]


@pytest.mark.parametrize("factor", [1.0, 0.25, 65536.0, -3.0, 0.0])
def test_scaled_loss(factor: float, device: torch.device) -> None:
    arguments = make_arguments("element", torch.float32, device)
    once = gradients(fastvae.gaussian_nll_loss(**arguments), arguments)
    scaled = gradients(factor * fastvae.gaussian_nll_loss(**arguments), arguments)
    for gradient, plain in zip(scaled, once, strict=True):
        torch.testing.assert_close(gradient, factor * plain, rtol=1e-6, atol=0)


def test_accumulates_over_two_losses_and_a_regularizer(device: torch.device) -> None:
    arguments = make_arguments("learned", torch.float64, device)
    leaves = [value for value in arguments.values() if isinstance(value, Tensor)]

    def total(loss: Any) -> Tensor:
        parts = [0.5 * loss(**arguments), loss(**arguments)]
        return sum(parts, leaves[1].square().sum())

    found = torch.autograd.grad(total(fastvae.gaussian_nll_loss), leaves)
    want = torch.autograd.grad(total(reference.gaussian_nll_loss), leaves)
    for gradient, right in zip(found, want, strict=True):
        torch.testing.assert_close(gradient, right)


def test_second_backward_of_a_retained_graph(device: torch.device) -> None:
    arguments = make_arguments("channel", torch.float32, device)
    loss = 3 * fastvae.gaussian_nll_loss(**arguments)
    first = [g.clone() for g in gradients(loss, arguments, retain_graph=True)]
    for again, before in zip(gradients(loss, arguments), first, strict=True):
        torch.testing.assert_close(again, before)


def test_double_backward(device: torch.device) -> None:
    arguments = make_arguments("element", torch.float64, device)
    leaves = list(arguments.values())

    def loss(*tensors: Tensor) -> Tensor:
        return fastvae.gaussian_nll_loss(*tensors)

    small = [leaf[:2, :1, :2, :2].detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(loss, small)
    assert torch.autograd.gradgradcheck(loss, small)


def test_grad_scaler_sees_float16_gradients_that_would_underflow(device: torch.device) -> None:
    x = torch.zeros(4, 1 << 15, device=device, dtype=torch.float16)
    mean = torch.full_like(x, 1e-3).requires_grad_()
    loss = fastvae.gaussian_nll_loss(x, mean) / 1e4
    (gradient,) = torch.autograd.grad(loss * 65536.0, mean)
    torch.testing.assert_close(
        gradient.float() / 65536, torch.full_like(gradient.float(), 1e-3 / 4e4), rtol=1e-2, atol=0
    )


def test_saves_its_inputs_and_gives_its_gradient_away(device: torch.device) -> None:
    arguments = make_arguments("number", torch.float32, device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastvae.gaussian_nll_loss(**arguments).backward()
    inputs = {arguments["x"].data_ptr(), arguments["mean"].data_ptr()}
    assert {tensor.data_ptr() for tensor in saved} == inputs


@pytest.mark.parametrize("scale", SCALES)
def test_without_gradients(scale: str, device: torch.device) -> None:
    arguments = make_arguments(scale, torch.float32, device)
    with torch.no_grad():
        loss = fastvae.gaussian_nll_loss(**arguments)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference.gaussian_nll_loss(**arguments).detach())


def test_empty_batch_and_wrong_reduction(device: torch.device) -> None:
    x = torch.zeros(0, 4, device=device, requires_grad=True)
    assert fastvae.gaussian_nll_loss(x, x.detach(), reduction="sum").item() == 0
    assert fastvae.gaussian_nll_loss(x, x.detach()).isnan()  # as torch's mean of nothing
    for loss in (fastvae.gaussian_nll_loss, reference.gaussian_nll_loss):
        with pytest.raises(ValueError, match="reduction is 'none'; want 'mean', 'sum' or"):
            loss(x, x, reduction="none")
