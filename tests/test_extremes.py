"""Infinities, NaN and scales that leave the range: what float64 rounds to, or the limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from accuracy import exact, gradients
from cases import DTYPES, FORMS, OPS, SEED, Op, each_op_and_form, op_id
from torch import Tensor

import fastvae
from fastvae import reference

INF, NAN = math.inf, math.nan
LOCATIONS = (0.0, 1.0, -3.0, INF, -INF, NAN)
# e^{2 * 40}, a 1 / sigma^2, is still a float32.
LOG_SCALES = (0.0, 1.0, -40.0, 60.0, 1e4, -1e4, INF, -INF, NAN)
SCALES = (1.0, 0.5, 1e-4, 1e4, INF, NAN)  # and 0 and -1, which have tests of their own

ELEMENTWISE = tuple(op for op in OPS if op.name in (
    "rsample", "kl to N(0, I)", "kl between", "rsample_kl to N(0, I)", "rsample_kl between",
    "log_ratio to N(0, I)", "log_ratio between",
    "log_prob, elementwise", "bernoulli", "continuous bernoulli", "laplace, elementwise",
    "discretized logistic, elementwise",
))  # fmt: skip
# At infinity the reference's straight-through value is NaN.
each_op_and_param = each_op_and_form(
    ELEMENTWISE, [param for param in FORMS if "straight_through" not in param]
)
each_module = pytest.mark.parametrize("module", [fastvae, reference], ids=["native", "reference"])

# Half a unit in the last place of a large ln sigma is some 1e-6 of sigma.
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def grid(op: Op, dtype: torch.dtype, param: str, device: torch.device) -> list[Tensor]:
    scales = SCALES if param in ("std", "var") else LOG_SCALES
    other = (2.0,)  # not met by a location: see test_the_mean_met_exactly
    axes = {"mu": LOCATIONS, "x": LOCATIONS, "mean": other, "prior_mu": other}
    if "logits" in op.arguments:
        axes["x"] = (0.0, 0.25, 1.0, NAN)
    if "log_scale" in op.arguments:  # the reference's gradients make 0 * inf of smaller ones
        axes["log_scale"] = (0.0, 1.0, -60.0, 60.0, 1e4, INF, NAN)
    points = product(*(axes.get(name, scales) for name in op.arguments))
    columns = torch.tensor(list(points), dtype=torch.float64).T
    return [column.to(device, dtype) for column in columns]


def assert_limits(results: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for y, value in zip(results, right, strict=True):
        torch.testing.assert_close(
            y.double(), value.to(y.dtype).double(), rtol=RTOL[y.dtype], atol=1e-6, equal_nan=True
        )


@each_op_and_param
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(op: Op, param: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = grid(op, dtype, param, device)
    assert_limits(
        op(fastvae, tensors, param, event_ndim=0), exact(op, tensors, param, event_ndim=0).values
    )
    grads, upstream = gradients(
        op, tensors, param, event_ndim=0, upstream=lambda ys: [torch.ones_like(y) for y in ys]
    )
    assert_limits(grads, exact(op, tensors, param, event_ndim=0, upstream=upstream).values)


@each_module
def test_limits_in_numbers(module: object, device: torch.device) -> None:
    one = torch.ones((), device=device)
    for logvar in (1e4, INF):
        assert module.kl_divergence(one, logvar) == INF
        assert module.rsample(one, logvar, seed=SEED).isinf()
        log_prob = module.gaussian_log_prob(one, 0.0, logvar)
        assert log_prob.item() == pytest.approx(-logvar / 2, rel=1e-3)
    for logvar in (-1e4, -INF):
        assert module.kl_divergence(one, logvar) == -logvar / 2
        assert module.rsample(one, logvar, seed=SEED) == 1
    assert module.gaussian_log_prob(one, 0.0, -1e4) == -INF
    assert module.laplace_log_prob(one, one, -1e4).item() == pytest.approx(1e4, rel=1e-3)
    for x, log_prob in ((1.0, 0.0), (0.0, -INF), (0.5, -INF)):  # all mass in the last bin
        assert module.discretized_logistic_log_prob(one * x, one, -1e4) == log_prob
    for x, mass in ((0.0, math.log(0.5)), (1.0, math.log(0.5)), (0.5, math.log(1 / 1020) - 1e4)):
        log_prob = module.discretized_logistic_log_prob(one * x, one, 1e4)
        assert log_prob.item() == pytest.approx(mass, rel=1e-6)
    for logvar in (1e4, 0.0, -80.0):  # q = p
        assert module.kl_divergence(one, logvar, one, logvar) == 0


@each_module
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_met_exactly(module: object, dtype: torch.dtype, device: torch.device) -> None:
    """Where x = mean, 1/sigma may overflow: (x - mean) / sigma is 0 nevertheless."""
    x = torch.tensor([0.0, 1.5], dtype=dtype, device=device)
    for logvar in (-200.0, -1e4):
        s = torch.full_like(x, logvar)
        right = s.double() / -2 - 0.5 * math.log(2 * math.pi)
        assert_limits([module.gaussian_log_prob(x, x, s, event_ndim=0)], [right])
        kl = module.kl_divergence(x, s, x, s, event_ndim=0)
        assert torch.equal(kl, torch.zeros_like(kl))


@each_module
@pytest.mark.parametrize("param", ["std", "var"])
def test_scale_zero_and_below(module: object, param: str, device: torch.device) -> None:
    mu = torch.tensor([0.5, 0.5], device=device)
    s = torch.tensor([0.0, -1.0], device=device, requires_grad=True)
    z = module.rsample(mu, s, param=param, seed=SEED)
    assert z[0] == 0.5
    assert z[1].isnan()
    kl = module.kl_divergence(mu, s, param=param, event_ndim=0)
    assert kl[0] == INF
    assert kl[1].isnan()
    assert module.gaussian_log_prob(mu + 1, mu, s, param=param, event_ndim=0)[1].isnan()
    if param == "std":  # dz/dstd is the noise, at 0 as anywhere
        (grad,) = torch.autograd.grad(z[0], s)
        assert grad[0] == module.rsample(mu * 0, 1.0, param="std", seed=SEED)[0]


@pytest.mark.parametrize("op", OPS, ids=op_id)
def test_nan_stays_where_it_is(op: Op, device: torch.device) -> None:
    for k, name in enumerate(op.arguments):
        tensors = op.inputs((5, 40), device=device)
        if tensors[k].shape != (5, 40):
            continue
        tensors[k][2, 17] = NAN
        poisoned = torch.zeros(5, 40, dtype=torch.bool, device=device)
        poisoned[2, 17] = True
        results = op(fastvae, tensors)
        if op.draws and not name.startswith("prior"):
            z = results[0]
            assert torch.equal(z.isnan(), poisoned.expand(z.shape))
        if op.sums:
            sums = results[-1]
            assert torch.equal(sums.isnan(), poisoned.any(1).expand(sums.shape))
        for grad in gradients(op, tensors)[0]:
            if grad.shape == (5, 40):
                assert not (grad.isnan() & ~poisoned).any()
