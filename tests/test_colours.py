"""Colours of pixels as a mixture of discretized logistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import seeded
from test_mixtures import assert_close, gradients
from torch import Tensor
from torch.nn import functional as F

import fastvae
from fastvae import reference

pytestmark = pytest.mark.usefixtures("on_device")


def pixels(
    rows: int, channels: int, count: int, k: int, *, bins: int = 256, log_scale: float = -2.0
) -> tuple[Tensor, Tensor]:
    """Levels from -1 to 1, and parameters."""
    generator = seeded(rows + channels + count + k)
    x = torch.randint(bins, (rows, channels, count), generator=generator)
    planes = k * (10 if channels == 3 else 3)
    parameters = torch.randn(rows, planes, count, generator=generator, dtype=torch.float64) / 2
    rest = parameters[:, k:].unflatten(1, (channels, -1, k))
    rest[:, :, 1] += log_scale
    return x.double() * (2 / (bins - 1)) - 1, parameters


def pixelcnn(x: Tensor, parameters: Tensor, k: int) -> Tensor:
    """As its authors write it, channels last, with their approximation where a mass is small."""
    x, p = x.movedim(1, -1), parameters.movedim(1, -1)
    logits = p[..., :k]
    p = p[..., k:].reshape(*x.shape, 3 * k)
    mean, log_scale, a = p[..., :k], p[..., k : 2 * k].clamp(min=-7), torch.tanh(p[..., 2 * k :])
    red, green = x[..., 0, None], x[..., 1, None]
    mean = torch.stack(
        (
            mean[..., 0, :],
            mean[..., 1, :] + a[..., 0, :] * red,
            mean[..., 2, :] + a[..., 1, :] * red + a[..., 2, :] * green,
        ),
        -2,
    )
    x = x.unsqueeze(-1)
    plus = torch.exp(-log_scale) * (x - mean + 1 / 255)
    minus = torch.exp(-log_scale) * (x - mean - 1 / 255)
    mass = torch.log((torch.sigmoid(plus) - torch.sigmoid(minus)).clamp(min=1e-300))
    mass = torch.where(x < -0.999, F.logsigmoid(plus), mass)
    mass = torch.where(x > 0.999, F.logsigmoid(-minus), mass)
    return torch.logsumexp(mass.sum(-2) + torch.log_softmax(logits, -1), -1).flatten(1).sum(1)


@pytest.mark.parametrize("log_scale", [-9.0, -4.0, 0.0, 5.0])
@pytest.mark.parametrize("sizes", [(2, 3, 1, 1), (1, 3, 33, 4), (3, 1, 16, 5), (2, 3, 300, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], log_scale: float
) -> None:
    x, parameters = pixels(*sizes, log_scale=log_scale)
    x, parameters = x.to(dtype), parameters.to(dtype)
    f = lambda t: fastvae.colour_mixture_log_prob(x, t, components=sizes[3])  # noqa: E731
    value, (grad,) = gradients(f, parameters)
    right, (right_grad,) = gradients(
        lambda t: reference.colour_mixture_log_prob(x.double(), t, components=sizes[3]),
        parameters.double(),
    )
    assert value.dtype == dtype
    assert_close(value, right, 3e-7 if dtype == torch.float32 else 1e-13)
    # Of scales far below a level's width, what x - m loses in float32 is multiplied by 1000.
    assert_close(
        grad,
        right_grad,
        (3e-4 if log_scale < -5 else 2e-5) if value.dtype == torch.float32 else 1e-8,
    )


def test_the_definition_is_pixelcnns() -> None:
    x, parameters = pixels(2, 3, 50, 10)
    found = reference.colour_mixture_log_prob(x, parameters, components=10)
    torch.testing.assert_close(found, pixelcnn(x, parameters, 10), rtol=1e-9, atol=0)


def test_channels_may_come_last() -> None:
    """VDVAE's layout."""
    x, parameters = pixels(2, 3, 6, 10)
    x, parameters = x.float().view(2, 3, 2, 3), parameters.float().view(2, 100, 2, 3)
    first = fastvae.colour_mixture_log_prob(x, parameters, components=10)
    last = [t.permute(0, 2, 3, 1) for t in (x, parameters)]
    assert torch.equal(fastvae.colour_mixture_log_prob(*last, components=10, channel_dim=-1), first)
    dense = [t.contiguous() for t in last]
    assert torch.equal(fastvae.colour_mixture_log_prob(*dense, components=10, channel_dim=3), first)


def test_masses_add_up_to_one() -> None:
    bins = 5
    levels = torch.linspace(-1, 1, bins, dtype=torch.float64)
    x = torch.cartesian_prod(levels, levels, levels).unsqueeze(2)
    parameters = pixels(1, 3, 1, 4)[1].expand(len(x), -1, -1)
    p = fastvae.colour_mixture_log_prob(x, parameters, components=4, bins=bins).exp()
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64))


def test_extremes_are_finite() -> None:
    x, parameters = (t.float() for t in pixels(1, 3, 32, 3))
    for log_scale in (-80.0, 40.0, 90.0):
        for mean in (-1e4, 0.0, 1e4):
            rest = parameters.clone()
            parts = rest[:, 3:].unflatten(1, (3, 3, 3))
            parts[:, :, 1], parts[:, :, 0] = log_scale, mean
            value, (grad,) = gradients(
                lambda t: fastvae.colour_mixture_log_prob(
                    x, t, components=3, least_log_scale=-math.inf
                ),
                rest,
            )
            assert not value.isnan().any()
            assert not grad.isnan().any()


def test_floor_of_scales_has_no_gradient_below() -> None:
    x, parameters = (t.float() for t in pixels(1, 3, 32, 2, log_scale=-20.0))
    _, (grad,) = gradients(
        lambda t: fastvae.colour_mixture_log_prob(x, t, components=2), parameters
    )
    assert (grad[:, 2:].unflatten(1, (3, 3, 2))[:, :, 1] == 0).all()
    assert (grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, parameters = (t.to(dtype) for t in pixels(2, 3, 20, 3))
    value, (grad,) = gradients(
        lambda t: fastvae.colour_mixture_log_prob(x, t, components=3), parameters
    )
    wide = fastvae.colour_mixture_log_prob(x.float(), parameters.float(), components=3)
    assert value.dtype == torch.float32
    assert torch.equal(value, wide)
    assert grad.dtype == dtype


@pytest.mark.parametrize("module", [fastvae, reference], ids=["native", "reference"])
@pytest.mark.parametrize("sizes", [(2, 3, 5, 2), (2, 1, 33, 3), (1, 3, 300, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pixels_that_are_weighted(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], module: Any
) -> None:
    """As the same pixels one by one; what weighs 0 may be NaN."""
    x, parameters = (t.to(dtype) for t in pixels(*sizes))
    weight = torch.rand(sizes[0], sizes[2], generator=seeded(5))
    weight[:, ::3] = 0
    rows = [t.double().movedim(1, 2).flatten(0, 1).unsqueeze(2) for t in (x, parameters)]
    leaf = rows[1].requires_grad_()
    each = reference.colour_mixture_log_prob(rows[0], leaf, components=sizes[3])
    right = (weight.flatten() * each).unflatten(0, weight.shape).sum(1)
    (right_grad,) = torch.autograd.grad(right.sum(), leaf)
    x[:, :, ::3], parameters[:, :, ::3] = math.nan, math.nan
    leaf = parameters.requires_grad_()
    value = module.colour_mixture_log_prob(x, leaf, components=sizes[3], weight=weight)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    exact = dtype == torch.float64
    assert_close(value, right, 1e-12 if exact else 1e-6)
    right_grad = right_grad.squeeze(2).unflatten(0, weight.shape).movedim(2, 1)
    half = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0
    assert_close(grad, right_grad, (1e-8 if exact else 2e-5) + half)
    assert (grad[:, :, ::3] == 0).all()
    with pytest.raises(AssertionError):  # had the mask been forgotten
        assert_close(value, each.unflatten(0, weight.shape).sum(1), 1e-2)


def test_a_mask_broadcasts() -> None:
    x, parameters = (t.float().unflatten(2, (2, 3)) for t in pixels(2, 3, 6, 2))
    mask = torch.tensor([True, False, True])
    found = fastvae.colour_mixture_log_prob(x, parameters, components=2, weight=mask)
    kept = fastvae.colour_mixture_log_prob(x[..., ::2], parameters[..., ::2], components=2)
    torch.testing.assert_close(found, kept)
    last = [t.movedim(1, -1) for t in (x, parameters)]
    again = fastvae.colour_mixture_log_prob(*last, components=2, channel_dim=-1, weight=mask)
    assert torch.equal(again, found)
    losses = [
        fastvae.colour_mixture_nll_loss(x, parameters, components=2, weight=w) for w in (mask, 1.0)
    ]
    assert torch.equal(losses[0], -found.mean())
    unweighted = fastvae.colour_mixture_nll_loss(x, parameters, components=2)
    assert torch.equal(losses[1], unweighted)


def test_second_derivatives_and_compile() -> None:
    x, parameters = pixels(1, 3, 2, 2)
    weight = torch.tensor([0.5, 2.0])
    f = lambda t: fastvae.colour_mixture_log_prob(  # noqa: E731
        x, t, components=2, weight=weight
    )
    assert torch.autograd.gradgradcheck(f, parameters.requires_grad_())
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    value, (grad,) = gradients(compiled, parameters)
    eager, (eager_grad,) = gradients(f, parameters)
    assert torch.equal(value, eager)
    assert torch.equal(grad, eager_grad)


@pytest.mark.parametrize("ndim", [0, 1])
def test_likelihood_is_the_mixture_of_every_number(ndim: int) -> None:
    likelihood = fastvae.DiscretizedLogisticMixture(4, 16)
    x = torch.randint(16, (3, 2, 5)).double() / 15
    decoded = torch.randn(*(2,) * ndim, 3, 12 * 2, 5, dtype=torch.float64)
    parts = decoded.unflatten(-2, (3, 4, 2)).unbind(-4)
    logits, mean, log_scale = (part.movedim(-3, -1) for part in parts)
    right = fastvae.discretized_logistic_mixture_log_prob(
        x, logits, mean, log_scale, bins=16, event_ndim=2
    )
    torch.testing.assert_close(likelihood.log_prob(x, decoded), right)
    torch.testing.assert_close(likelihood.log_prob(x.requires_grad_(), decoded), right)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x, p: f(x, p, components=0), ValueError, "components is 0"),
        (lambda f, x, p: f(x, p, components=4), ValueError, "100 planes|30 for 4|want 3 and 40"),
        (lambda f, x, p: f(x[:, :2], p, components=3), ValueError, "x has 2 channels"),
        (lambda f, x, p: f(x[..., :5], p, components=3), ValueError, "want one shape"),
        (lambda f, x, p: f(x, p, components=3, bins=1), ValueError, "bins is 1"),
        (lambda f, x, p: f(x, p, components=3, low=2.0), ValueError, "want low below high"),
        (lambda f, x, p: f(x, p, components=3, channel_dim=3), ValueError, "channel_dim"),
        (lambda f, x, p: f(x.clone().requires_grad_(), p, components=3), ValueError, "x requires"),
        (lambda f, x, p: f(0.5, p, components=3), TypeError, "x is a float"),
        (lambda f, x, p: f(x, p, components=3, weight=x[:, 0, :5]), ValueError, "weight has shape"),
        (
            lambda f, x, p: f(x, p, components=3, weight=torch.ones(6, requires_grad=True)),
            ValueError,
            "weight requires a gradient",
        ),
        (lambda f, x, p: f(x, p.cfloat(), components=3), TypeError, "dtype"),
    ],
)
def test_errors(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    x, parameters = pixels(2, 3, 6, 3)
    with pytest.raises(error, match=message):
        call(fastvae.colour_mixture_log_prob, x, parameters)
