"""Log-probabilities of pixels against mpmath's arithmetic, numerical integrals and gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastvae
from fastvae.ops.pixels import continuous_bernoulli_mean

mpmath.mp.dps = 60
LOGITS = (0, 1e-9, -1e-4, 0.01, -0.3, 0.4999, 0.5, -0.51, 1, -3, 10, 40, -100, 700)
BINS = 17


def real(value: float) -> mpmath.mpf:
    return mpmath.mpf(float(value))


def exact_bernoulli(x: float, logit: float) -> mpmath.mpf:
    def log_sigmoid(t: mpmath.mpf) -> mpmath.mpf:
        return -mpmath.log1p(mpmath.exp(-t))

    return real(x) * log_sigmoid(real(logit)) + (1 - real(x)) * log_sigmoid(-real(logit))


def exact_continuous_bernoulli(x: float, logit: float) -> mpmath.mpf:
    """The paper's form, with lambda = s(l) and its normalizer."""
    if logit == 0:
        return mpmath.mpf(0)
    lam = 1 / (1 + mpmath.exp(-real(logit)))
    normalizer = 2 * mpmath.atanh(1 - 2 * lam) / (1 - 2 * lam)
    return exact_bernoulli(x, logit) + mpmath.log(normalizer)


def exact_laplace(x: float, m: float, s: float) -> mpmath.mpf:
    b = mpmath.exp(real(s))
    return mpmath.log(mpmath.exp(-abs(real(x) - real(m)) / b) / (2 * b))


def exact_discretized_logistic(x: float, m: float, s: float) -> mpmath.mpf:
    def below(end: mpmath.mpf) -> mpmath.mpf:
        return 1 / (1 + mpmath.exp(-(end - real(m)) / mpmath.exp(real(s))))

    half = mpmath.mpf(1) / (2 * (BINS - 1))
    upper = 1 if x == 1 else below(real(x) + half)
    lower = 0 if x == 0 else below(real(x) - half)
    return mpmath.log(upper - lower)


GREY = (0.0, 0.1, 0.5, 0.9, 1.0)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., mpmath.mpf], list[tuple]]] = {
    "bernoulli": (
        fastvae.bernoulli_log_prob,
        exact_bernoulli,
        list(product(GREY, LOGITS)),
    ),
    "continuous_bernoulli": (
        fastvae.continuous_bernoulli_log_prob,
        exact_continuous_bernoulli,
        # where the paper's form is exact in 60 digits
        list(product(GREY, LOGITS[:-2])),
    ),
    "laplace": (
        fastvae.laplace_log_prob,
        exact_laplace,
        [(x, m, s) for x in GREY for m in (-3.0, 0.1, 1e3) for s in (-5.0, 0.0, 3.0)],
    ),
    "discretized_logistic": (
        partial(fastvae.discretized_logistic_log_prob, bins=BINS),
        exact_discretized_logistic,
        [
            (x, m, s)
            for x in (0.0, 0.25, 0.5, 1.0)
            for m in (-1.0, 0.3, 0.5, 5.0)
            for s in (-3.5, -1.0, 3.0, 8.0)
        ],
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_are_exact(name: str, dtype: torch.dtype, device: torch.device) -> None:
    function, exact, points = CASES[name]
    arguments = torch.tensor(points, dtype=dtype, device=device).unbind(1)
    got = function(*arguments, event_ndim=0).double().cpu()
    rounded = torch.stack(arguments, 1).double().tolist()  # to what the function was given
    want = torch.tensor([float(exact(*point)) for point in rounded], dtype=torch.float64)
    # Relative to the value, or to 1 where the density is about 1 and its logarithm about 0; the
    # bins' masses are as exact as their ends are known.
    eps = torch.finfo(dtype).eps * (100 if "logistic" in name else 8)
    tolerance = eps * want.abs().clamp(min=1)
    assert ((got - want).abs() <= tolerance).all()
    assert ((got - (want + 3 * tolerance)).abs() > tolerance).all()


def test_tails_are_relatively_exact() -> None:
    """Where the likely value is nearly certain, its logarithm keeps all digits."""
    one = torch.ones((), dtype=torch.float64)
    for l in (20.0, 40.0, 300.0):  # noqa: E741
        got = fastvae.bernoulli_log_prob(one, one * l).item()
        assert got == pytest.approx(float(exact_bernoulli(1, l)), rel=1e-14)
        assert got < 0


@each_case
def test_gradients(name: str, device: torch.device) -> None:
    function, _, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(BINS, (3, 4), generator=generator).double() / (BINS - 1)
    others = [torch.randn(3, 4, dtype=torch.float64, generator=generator)]
    if name in ("laplace", "discretized_logistic"):
        others.append(torch.randn(4, dtype=torch.float64, generator=generator))
    others = [t.to(device).requires_grad_() for t in others]
    call = partial(function, x.to(device))
    assert gradcheck(call, others)
    if name != "laplace":  # whose second derivative by the mean is a point mass
        assert gradgradcheck(call, others)


def test_gradients_of_logits_at_and_near_0(device: torch.device) -> None:
    """d/dl = x - mean, exactly so where series and formula meet, and at 0."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, device=device, requires_grad=True)
    for x in GREY:
        (grad,) = torch.autograd.grad(
            fastvae.continuous_bernoulli_log_prob(torch.full_like(logits, x), logits).sum(), logits
        )
        torch.testing.assert_close(grad, x - continuous_bernoulli_mean(logits.detach()))
        (grad,) = torch.autograd.grad(
            fastvae.bernoulli_log_prob(torch.full_like(logits, x), logits).sum(), logits
        )
        torch.testing.assert_close(grad, x - torch.sigmoid(logits.detach()))
    exact = [0.5 if t == 0 else float(1 / -mpmath.expm1(-real(t)) - 1 / real(t)) for t in LOGITS]
    mean = continuous_bernoulli_mean(logits.detach()).cpu()
    torch.testing.assert_close(mean, torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0)


def test_densities_and_masses_add_up_to_one(device: torch.device) -> None:
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64, device=device)
    for l in (0.0, 1e-3, -0.4999, 2.0, -30.0):  # noqa: E741
        density = fastvae.continuous_bernoulli_log_prob(grid, l, event_ndim=0).exp()
        assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
        both = fastvae.bernoulli_log_prob(grid[[0, -1]], l, event_ndim=0).exp()
        assert both.sum().item() == pytest.approx(1)
    wide = torch.linspace(-30, 30, 60_001, dtype=torch.float64, device=device)
    density = fastvae.laplace_log_prob(wide, 0.3, -0.5, event_ndim=0).exp()
    assert torch.trapezoid(density, wide).item() == pytest.approx(1, abs=1e-4)
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        levels = torch.linspace(low, high, 256, dtype=torch.float64, device=device)
        parameters = torch.tensor([[0.4, -3.0], [-2.0, 0.5], [0.6, -12.0]]).double().to(device)
        for mean, log_scale in parameters:
            mass = fastvae.discretized_logistic_log_prob(
                levels, mean, log_scale, low=low, high=high, event_ndim=0
            ).exp()
            assert mass.sum().item() == pytest.approx(1, abs=1e-10)
        mass = fastvae.discretized_logistic_mixture_log_prob(
            levels,
            parameters[:, 0].expand(256, -1),
            parameters[:, 0].expand(256, -1),
            parameters[:, 1].expand(256, -1),
            low=low,
            high=high,
            event_ndim=0,
        ).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-10)


def test_mixture_and_categorical_are_their_definitions(device: torch.device) -> None:
    torch.manual_seed(0)
    x = (torch.randint(BINS, (2, 5)) / (BINS - 1)).double().to(device)
    logits, mean, log_scale = torch.randn(3, 7, 2, 5, 4, dtype=torch.float64, device=device)
    of_each = torch.stack(
        [
            fastvae.discretized_logistic_log_prob(
                x, mean[..., k], log_scale[..., k], bins=BINS, event_ndim=0
            )
            for k in range(4)
        ],
        -1,
    )
    want = (torch.softmax(logits, -1) * of_each.exp()).sum(-1).log()
    got = fastvae.discretized_logistic_mixture_log_prob(
        x, logits, mean, log_scale, bins=BINS, event_ndim=1
    )
    torch.testing.assert_close(got, want.sum(-1))
    arguments = [t[0].detach().requires_grad_() for t in (logits, mean, log_scale)]
    call = partial(fastvae.discretized_logistic_mixture_log_prob, x, bins=BINS)
    assert gradcheck(call, arguments)

    index = torch.randint(4, (2, 5), device=device)
    want = torch.distributions.Categorical(logits=logits).log_prob(index)
    got = fastvae.categorical_log_prob(index, logits, event_ndim=1)
    torch.testing.assert_close(got, want.sum(-1))
    assert gradcheck(partial(fastvae.categorical_log_prob, index), logits[0].requires_grad_())
    with pytest.raises(TypeError, match=r"x has dtype torch.int32; want torch.int64"):
        fastvae.categorical_log_prob(index.int(), logits)


@each_case
def test_half_types_are_summed_in_float32(name: str, device: torch.device) -> None:
    function, _, _ = CASES[name]
    n = 3 if name in ("laplace", "discretized_logistic") else 2
    torch.manual_seed(0)
    half = [t.bfloat16().to(device) for t in torch.rand(n, 2, 3, 50)]
    got = function(*half)
    assert got.dtype == torch.float32
    assert got.shape == (2,)
    torch.testing.assert_close(got, function(*(t.float() for t in half)))
    assert function(*half, event_ndim=1).shape == (2, 3)


def test_wrong_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"shapes do not broadcast: x \[2, 3\], logits \[2, 4\]"):
        fastvae.bernoulli_log_prob(x, torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"mean has dtype torch.complex64"):
        fastvae.laplace_log_prob(x, x.cfloat())
    with pytest.raises(ValueError, match="bins is 1; want at least 2"):
        fastvae.discretized_logistic_log_prob(x, x, bins=1)
    with pytest.raises(ValueError, match=r"low is 1.0 and high is 1.0; want low below high"):
        fastvae.discretized_logistic_log_prob(x, x, low=1.0)
