"""Other ways to the scale of a Gaussian: softplus, a floor of sigma, and a prior's own `param`."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from accuracy import assert_accurate, exact, gradients, same_bits
from cases import DTYPES, SEED, from_logvar
from cases import Op as CaseOp
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import softplus

import fastvae
from fastvae import DiagonalGaussian, reference

PARAMS = ("logvar", "log_std", "std", "var", "softplus")
FLOORS = (0.0, 1e-3, 0.5)
Q, X = ("mu", "scale"), ("x", "mean", "scale")
OPS = (
    CaseOp("rsample", "rsample", Q),
    CaseOp("kl", "kl_divergence", Q),
    CaseOp("rsample_kl", "rsample_kl", Q),
    CaseOp("log_ratio", "rsample_log_ratio", Q),
    CaseOp("log_prob", "gaussian_log_prob", X),
)
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_param = pytest.mark.parametrize("param", PARAMS)
each_floor = pytest.mark.parametrize("floor", FLOORS)


def inputs(
    op: CaseOp, param: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[CaseOp, list[Tensor]]:
    *others, s = op.inputs(shape, torch.float64, device=device)
    return op, [t.to(dtype) for t in (*others, from_logvar(s, param))]


def of(op: CaseOp, param: str, floor: float) -> CaseOp:
    return CaseOp(op.name, op.function, op.arguments, {"param": param, "min_std": floor})


def sigma(s: Tensor, param: str, floor: float) -> Tensor:
    return {
        "logvar": lambda: torch.exp(s / 2),
        "log_std": lambda: torch.exp(s),
        "std": lambda: s,
        "var": lambda: torch.sqrt(s),
        "softplus": lambda: softplus(s, threshold=40),
    }[param]() + floor


@each_op
@each_param
@each_floor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(
    op: CaseOp, param: str, floor: float, dtype: torch.dtype, device: torch.device
) -> None:
    op, tensors = inputs(of(op, param, floor), param, (4, 70), dtype, device)
    assert_accurate(op(fastvae, tensors), exact(op, tensors), dtype)
    grads, upstream = gradients(op, tensors)
    assert_accurate(grads, exact(op, tensors, upstream=upstream), dtype)


@each_op
@each_param
@each_floor
def test_the_definition_is_that_of_sigma(
    op: CaseOp, param: str, floor: float, device: torch.device
) -> None:
    op, tensors = inputs(of(op, param, floor), param, (4, 9), torch.float64, device)
    plain = CaseOp(op.name, op.function, op.arguments, {"param": "std"})
    found = op(reference, tensors)
    right = plain(reference, [*tensors[:-1], sigma(tensors[-1], param, floor)])
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_param
def test_another_floor_is_told_apart(param: str, device: torch.device) -> None:
    """The negative control."""
    op, tensors = inputs(of(OPS[1], param, 0.5), param, (4, 70), torch.float32, device)
    with pytest.raises(AssertionError, match="is off by"):
        assert_accurate(op(fastvae, tensors), exact(of(op, param, 0.501), tensors), torch.float32)


@each_param
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_derivatives(param: str, floor: float, device: torch.device) -> None:
    op, tensors = inputs(of(OPS[2], param, floor), param, (3, 4), torch.float64, device)
    leaves = [t.requires_grad_() for t in tensors]
    assert gradcheck(lambda *ts: op(fastvae, ts), leaves)
    assert gradgradcheck(lambda *ts: op(fastvae, ts), leaves)


@pytest.mark.parametrize("floor", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("module", [fastvae, reference], ids=["fused", "reference"])
def test_a_small_softplus_keeps_its_digits(floor: float, module: Any, device: torch.device) -> None:
    """ln(1 + e^s) of s far below 0 is lost in 1 + e^s."""
    s = torch.tensor([-1000.0, -80.0, -30.0, -20.5, -19.5, -5.0, 0.0, 3.0, 30.0, 300.0])
    s = s.to(device).requires_grad_()
    z = torch.zeros_like(s)
    kl = module.kl_divergence(z, s, param="softplus", min_std=floor, event_ndim=0)
    (grad,) = torch.autograd.grad(kl.sum(), s)
    for k, t in enumerate(s.tolist()):
        with mpmath.workdps(50 + int(abs(t))):
            raised = mpmath.log1p(mpmath.exp(t)) + mpmath.mpf(floor)
            right = (raised**2 - 1) / 2 - mpmath.log(raised)
            slope = (raised - 1 / raised) / (1 + mpmath.exp(-t))
            if floor == 0 and t < -80:  # e^t is 0 as a float
                slope = mpmath.mpf(-1)
            assert abs(kl[k].item() - right) <= 1e-6 * max(1, abs(right)), t
            assert abs(grad[k].item() - slope) <= 1e-6 * max(1, abs(slope)), t


@pytest.mark.parametrize("own", PARAMS)
@pytest.mark.parametrize("prior_param", PARAMS)
@pytest.mark.parametrize("function", ["kl_divergence", "rsample_kl", "rsample_log_ratio"])
def test_a_prior_of_another_param(
    function: str, own: str, prior_param: str, device: torch.device
) -> None:
    op, floor = CaseOp(function, function, Q), 0.1
    _, (mu, s) = inputs(op, own, (4, 9), torch.float64, device)
    _, (prior_mu, prior_s) = inputs(op, prior_param, (4, 9), torch.float64, device)
    leaves = [t.clone().requires_grad_() for t in (mu, s, prior_mu.flip(0), prior_s.flip(1))]
    seed = {"seed": SEED} if op.draws else {}
    scales = sigma(leaves[1], own, floor), sigma(leaves[3], prior_param, floor)
    right = getattr(fastvae, function)(
        leaves[0], scales[0], leaves[2], scales[1], param="std", **seed
    )
    found = getattr(fastvae, function)(
        *leaves, param=own, prior_param=prior_param, min_std=floor, **seed
    )
    value, want = (y[-1] if isinstance(y, tuple) else y for y in (found, right))
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )


@pytest.mark.parametrize("param", ["softplus", "std"])
def test_distributions(param: str, device: torch.device) -> None:
    params = torch.randn(4, 10, device=device, dtype=torch.float64).abs().requires_grad_()
    mu, s = params.chunk(2, 1)
    std = sigma(s, param, 0.1)
    right = DiagonalGaussian(mu, std, param="std")
    p = DiagonalGaussian(mu.detach() + 1, s.detach() + 1, param=param, min_std=0.1)
    for q in (
        DiagonalGaussian(mu, s, param=param, min_std=0.1),
        DiagonalGaussian.from_params(params, param=param, min_std=0.1),
        DiagonalGaussian(mu, s, param=param, min_std=0.1).expand((4,)),
    ):
        torch.testing.assert_close(q.stddev, std)
        torch.testing.assert_close(q.logvar, std.log())
        torch.testing.assert_close(q.entropy(), right.entropy())
        torch.testing.assert_close(q.kl(), right.kl())
        torch.testing.assert_close(q.kl(p), right.kl(p))
        torch.testing.assert_close(p.kl(q), p.kl(right))
        torch.testing.assert_close(q.rsample(seed=3), right.rsample(seed=3))
        torch.testing.assert_close(q.log_prob(mu + 1), right.log_prob(mu + 1))
        (found,) = torch.autograd.grad(q.kl().sum(), params, retain_graph=True)
        (want,) = torch.autograd.grad(right.kl().sum(), params, retain_graph=True)
        torch.testing.assert_close(found, want)


def test_models_and_mixtures(device: torch.device) -> None:
    model = fastvae.VAE(
        torch.nn.Linear(6, 8), torch.nn.Linear(4, 6), param="softplus", min_std=0.1
    ).to(device)
    q = model.encode(torch.randn(3, 6, device=device))
    assert (q.stddev > 0.1).all()
    z, mu, s = torch.randn(5, 3, device=device), *torch.randn(2, 4, 3, device=device).unbind()
    torch.testing.assert_close(
        fastvae.mixture_log_prob(z, mu, s, param="softplus"),
        fastvae.mixture_log_prob(z, mu, softplus(s), param="std"),
    )


def test_a_compiled_step() -> None:
    mu, s = torch.randn(2, 4, 9).requires_grad_().unbind()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(mu: Tensor, s: Tensor) -> Tensor:
        return fastvae.kl_divergence(mu, s, param="softplus", min_std=0.1)

    right = fastvae.kl_divergence(mu, s, param="softplus", min_std=0.1)
    assert same_bits(step(mu, s), right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_std": -0.1}, "min_std is -0.1; want a finite number, at least 0"),
        ({"min_std": math.inf}, "min_std is inf; want a finite number"),
        ({"min_std": math.nan}, "min_std is nan; want a finite number"),
        ({"min_std": 0.1, "bound": fastvae.Bound()}, "bound is given and min_std is 0.1"),
        ({"param": "softplus", "bound": fastvae.Bound()}, "bound is given and param is 'softplus'"),
        ({"param": "sigma", "min_std": 0.1}, "param is 'sigma'; want one of"),
        ({"prior_param": "sigma", "prior_mu": 0.0, "prior_logvar": 0.0}, "param is 'sigma'; want"),
    ],
    ids=str,
)
def test_rejects(options: dict[str, Any], message: str) -> None:
    for module in (fastvae, reference):
        with pytest.raises(ValueError, match=message):
            module.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3), **options)


@pytest.mark.parametrize("ends", [(-math.inf, 1.0), (0.0, math.inf)], ids=str)
def test_tanh_wants_finite_ends(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="want both finite with kind 'tanh'"):
        fastvae.Bound(*ends, "tanh")


def test_tanh_on_the_mean_too() -> None:
    """NVAE's 5 tanh(x / 5)."""
    x = torch.linspace(-20, 20, 41)
    torch.testing.assert_close(fastvae.Bound(-5, 5, "tanh")(x), 5 * torch.tanh(x / 5))
