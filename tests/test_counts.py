"""Log-probabilities of counts against mpmath: values and every gradient, over the whole domain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType

import mpmath
import numpy as np
import pytest
import torch
from accuracy import seeded
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastvae
from fastvae import reference

pytestmark = pytest.mark.usefixtures("on_device")

COUNTS = (0, 1, 2, 3, 7, 31, 250, 12345, 10**6)
MEANS = (0.01, 0.5, 1.0, 7.3, 300.0, 1e6)
THETAS = (1e-4, 0.03, 0.99, 1.0, 1.01, 7.9, 8.1, 1e3, 1e6, 1e8, 1e10)
LOGITS = (-100.0, -3.0, 0.0, 0.7, 100.0)
BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-13}
Real = mpmath.mpf
each_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


class Exact:
    """A sum of terms, which may cancel."""

    def __init__(self, *terms: Real) -> None:
        self.value = mpmath.fsum(terms)
        self.largest = max(abs(t) for t in terms)

    def times(self, factor: Real) -> Exact:
        result = Exact(self.value * factor)
        result.largest = self.largest * abs(factor)
        return result

    def error(self, got: float) -> float:
        """Relative; of a sum of terms that cancel, to the largest. Below 10^-30 digits are lost,
        of exponents first: e^-70 has an error of 70 roundings."""
        scale = max(abs(self.value), self.largest, 1e-30)
        return float(abs(Real(got) - self.value) / scale)


# Each: the value, and its derivatives by all arguments.
def poisson(x: Real, m: Real) -> list[Exact]:
    by_x = Exact(mpmath.log(m), -mpmath.digamma(x + 1))
    return [
        Exact(x * mpmath.log(m), -m, -mpmath.loggamma(x + 1)),
        by_x,
        Exact(x / m, Real(-1)),
    ]


def negative_binomial(x: Real, m: Real, t: Real) -> list[Exact]:
    share = mpmath.log(t / (t + m))
    return [
        Exact(
            mpmath.loggamma(x + t) - mpmath.loggamma(t),
            -mpmath.loggamma(x + 1),
            t * share,
            x * mpmath.log(m / (t + m)),
        ),
        Exact(mpmath.digamma(x + t), -mpmath.digamma(x + 1), mpmath.log(m / (t + m))),
        Exact(x / m, -(x + t) / (m + t)),
        Exact(mpmath.digamma(x + t) - mpmath.digamma(t), share, (m - x) / (m + t)),
    ]


def zero_inflated(x: Real, m: Real, t: Real, logit: Real) -> list[Exact]:
    nb = negative_binomial(x, m, t)
    extra, none = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(logit))
    if x > 0:
        by_l = Exact(-extra)
        value = Exact(nb[0].value, -mpmath.log1p(mpmath.exp(logit)))
        value.largest = max(value.largest, nb[0].largest)
        return [value, *nb[1:], by_l]
    at_0 = mpmath.exp(nb[0].value)
    zero = extra + none * at_0
    others = none * at_0 / zero
    by_l = Exact(extra * none * (1 - at_0) / zero)
    return [Exact(mpmath.log(zero)), *(part.times(others) for part in nb[1:]), by_l]


Oracle = Callable[..., list[Exact]]
CASES: dict[str, tuple[Oracle, tuple[str, str], list[tuple[float, ...]]]] = {
    "poisson_log_prob": (
        poisson,
        ("rate", "log_rate"),
        [*itertools.product(COUNTS, (*MEANS, 1e-30))],
    ),
    "negative_binomial_log_prob": (
        negative_binomial,
        ("mean", "log"),
        [*itertools.product(COUNTS, MEANS, THETAS)],
    ),
    "zero_inflated_negative_binomial_log_prob": (
        zero_inflated,
        ("mean", "log"),
        [
            *itertools.product((0, 1, 7, 250), MEANS[:-1], THETAS[::2], LOGITS),
            (0, 1e6, 1e3, -100.0),  # an extra zero is as rare as another
            (0, 300.0, 1e-4, -40.0),
            (0, 0.01, 1e10, -20.0),
        ],
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


def arguments(name: str, param: str, dtype: torch.dtype) -> list[Tensor]:
    _, _, grid = CASES[name]
    columns = [torch.tensor(column, dtype=dtype) for column in zip(*grid, strict=True)]
    if param.startswith("log"):
        columns[1:3] = [c.log() for c in columns[1:3]]
    return columns


@pytest.fixture(scope="module")
def right() -> Callable[[str, str, torch.dtype], list[list[Exact]]]:
    """For each point of the grid what is exact, of the rounded arguments."""
    known: dict[tuple[str, str, torch.dtype], list[list[Exact]]] = {}

    def find(name: str, param: str, dtype: torch.dtype) -> list[list[Exact]]:
        key = name, param, dtype
        if key not in known:
            with mpmath.workdps(60):
                known[key] = [
                    exact(name, param, [Real(float(v)) for v in point])
                    for point in zip(*arguments(name, param, dtype), strict=True)
                ]
        return known[key]

    return find


def exact(name: str, param: str, point: list[Real]) -> list[Exact]:
    logarithmic = param.startswith("log")
    given = [mpmath.exp(v) if logarithmic and k in (1, 2) else v for k, v in enumerate(point)]
    found = CASES[name][0](*given)
    if logarithmic:
        for k in range(1, min(3, len(point))):
            found[k + 1] = found[k + 1].times(given[k])
    return found


def computed(module: ModuleType, name: str, param: str, columns: list[Tensor]) -> list[Tensor]:
    leaves = [c.clone().requires_grad_() for c in columns]
    value = getattr(module, name)(*leaves, param=param, event_ndim=0)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def worst(results: list[Tensor], right: list[list[Exact]]) -> list[float]:
    """The largest error of the value and of each gradient."""
    with mpmath.workdps(60):
        return [
            max(point[k].error(float(y)) for y, point in zip(result, right, strict=True))
            for k, result in enumerate(results)
        ]


@each_case
@each_dtype
@pytest.mark.parametrize("logarithmic", [False, True], ids=["plain", "log"])
def test_values_and_gradients(
    name: str, dtype: torch.dtype, logarithmic: bool, right: Callable[..., list[list[Exact]]]
) -> None:
    param = CASES[name][1][logarithmic]
    results = computed(fastvae, name, param, arguments(name, param, dtype))
    errors = worst(results, right(name, param, dtype))
    # A logarithm of 10^10 that is rounded is off by 10^-6 in what it stands for, and is exact here.
    assert max(errors) <= BOUNDS[dtype], errors


@each_case
@each_dtype
def test_a_difference_of_gamma_functions_fails(
    name: str, dtype: torch.dtype, right: Callable[..., list[list[Exact]]]
) -> None:
    """The negative control: the usual formula, with its epsilon."""
    x, m, *rest = arguments(name, CASES[name][1][0], dtype)
    if not rest:
        value = x * torch.log(m + 1e-8) - m - torch.lgamma(x + 1)
    else:
        t = rest[0]
        odds = torch.log(t + m + 1e-8)
        value = t * (torch.log(t + 1e-8) - odds) + x * (torch.log(m + 1e-8) - odds)
        value = value + torch.lgamma(x + t) - torch.lgamma(t) - torch.lgamma(x + 1)
    if len(rest) > 1:
        value = torch.where(
            x == 0,
            torch.log(torch.sigmoid(rest[1]) + torch.sigmoid(-rest[1]) * value.exp()),
            value - torch.nn.functional.softplus(rest[1]),
        )
    assert worst([value], right(name, CASES[name][1][0], dtype))[0] > BOUNDS[dtype]


@each_case
def test_the_reference_in_float64(name: str, right: Callable[..., list[list[Exact]]]) -> None:
    """Absolute, where it is near 0: the definition takes differences that the kernels do not."""
    for param in CASES[name][1]:
        columns = arguments(name, param, torch.float64)
        results = computed(reference, name, param, columns)
        for k, result in enumerate(results):
            for y, point in zip(result, right(name, param, torch.float64), strict=True):
                scale = max(point[k].largest, abs(point[k].value), 1)
                assert abs(float(y) - point[k].value) <= 1e-9 * scale


def test_it_runs_into_the_poisson_distribution() -> None:
    x, mean = torch.tensor(COUNTS[:-1]).float(), torch.tensor([[0.01], [1.0], [40.0], [12000.0]])
    want = fastvae.poisson_log_prob(x, mean, event_ndim=0)
    for theta in (1e12, 1e20, 1e30):
        got = fastvae.negative_binomial_log_prob(x, mean, theta, event_ndim=0)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got = fastvae.negative_binomial_log_prob(x, mean.log(), 200.0, param="log", event_ndim=0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # ln 12000 is rounded


@pytest.mark.parametrize("module", [fastvae, reference], ids=["native", "reference"])
@each_dtype
def test_a_mean_of_0(module: ModuleType, dtype: torch.dtype) -> None:
    x, zero = torch.tensor([0.0, 1.0, 30.0], dtype=dtype), torch.zeros((), dtype=dtype)
    for value in (
        module.poisson_log_prob(x, zero, event_ndim=0),
        module.negative_binomial_log_prob(x, zero, 2.0, event_ndim=0),
        module.negative_binomial_log_prob(x, zero - math.inf, 0.7, param="log", event_ndim=0),
    ):
        assert value.tolist() == [0, -math.inf, -math.inf]
    mean = torch.zeros((), dtype=dtype, requires_grad=True)
    for value in (
        module.poisson_log_prob(0, mean, event_ndim=0),
        module.negative_binomial_log_prob(0, mean, 2.0, event_ndim=0),
    ):
        assert torch.autograd.grad(value, mean)[0].item() == -1


def test_logarithms_beyond_what_exponentials_express() -> None:
    """ln m = -200 or theta of e^-200 underflow in float32, not what is asked for."""
    x = torch.tensor([0.0, 1.0, 9.0])
    for log_mean, log_theta in ((-200.0, 0.5), (1.0, -200.0), (-150.0, -120.0), (120.0, 1.0)):
        pair = [torch.tensor(v, requires_grad=True) for v in (log_mean, log_theta)]
        got = fastvae.negative_binomial_log_prob(x, *pair, param="log", event_ndim=0)
        with mpmath.workdps(200):
            point = [mpmath.exp(Real(log_mean)), mpmath.exp(Real(log_theta))]
            right = [negative_binomial(Real(v.item()), *point) for v in x]
            for y, all_right in zip(got, right, strict=True):
                grads = torch.autograd.grad(y, pair, retain_graph=True)
                largest = max(all_right[0].largest, 1e-18)  # of what is below only that much holds
                assert float(abs(all_right[0].value - y.item()) / largest) <= 2e-6
                for grad, part, factor in zip(grads, all_right[2:], point, strict=True):
                    assert float(abs(part.value * factor - grad.item())) <= 2e-6 * max(
                        1, abs(float(part.value * factor))
                    )
    rate = torch.tensor(-200.0, requires_grad=True)
    got = fastvae.poisson_log_prob(x, rate, param="log_rate", event_ndim=0)
    want = x * -200 - torch.lgamma(x + 1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(got.sum(), rate)[0].item() == 10


def test_probabilities_add_up_to_1() -> None:
    x = torch.arange(20000, dtype=torch.float64)
    for mean, theta, logit in ((0.3, 0.1, -1.0), (40.0, 3.0, 2.0), (700.0, 1e5, 0.0)):
        for log_prob in (
            fastvae.poisson_log_prob(x, mean, event_ndim=0),
            fastvae.negative_binomial_log_prob(x, mean, theta, event_ndim=0),
            fastvae.zero_inflated_negative_binomial_log_prob(x, mean, theta, logit, event_ndim=0),
        ):
            assert abs(log_prob.exp().sum().item() - 1) < 1e-12


@each_case
def test_second_derivatives(name: str) -> None:
    generator = seeded(0)
    for param in CASES[name][1]:
        leaves = [
            torch.rand(2, 3, generator=generator, dtype=torch.float64).add(0.3).requires_grad_()
            for _ in CASES[name][2][0]
        ]
        call = lambda *t, param=param: getattr(fastvae, name)(*t, param=param)  # noqa: E731
        assert gradcheck(call, leaves, check_forward_ad=True)
        assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("whole", [torch.uint8, torch.int32, torch.int64, torch.bool], ids=str)
def test_whole_numbers_as_counts(whole: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([[0, 1, 1], [1, 0, 1]], device=device).to(whole)
    mean = torch.rand(2, 3, device=device).add(0.1).requires_grad_()
    theta = torch.rand(3, device=device).add(0.1).requires_grad_()
    got = fastvae.negative_binomial_log_prob(x, mean, theta)
    torch.testing.assert_close(got, fastvae.negative_binomial_log_prob(x.float(), mean, theta))
    assert theta.grad is None
    fastvae.negative_binomial_nll_loss(x, mean, theta).backward()
    assert theta.grad.shape == (3,)
    half = fastvae.negative_binomial_log_prob(x.int() * 70001, mean.half(), theta.half())
    assert half.isfinite().all()  # 70001 is no float16


def test_a_number_and_its_errors() -> None:
    x = torch.arange(6.0).view(2, 3)
    got = fastvae.negative_binomial_log_prob(x, 2.0, 3.0)
    logits = math.log(2 / 3)
    want = torch.distributions.NegativeBinomial(torch.tensor(3.0), logits=torch.tensor(logits))
    torch.testing.assert_close(got, want.log_prob(x).sum(-1))
    want = torch.distributions.Poisson(torch.tensor(2.0)).log_prob(x)
    torch.testing.assert_close(fastvae.poisson_log_prob(x, 2.0), want.sum(-1))
    for call, message in (
        (lambda: fastvae.poisson_log_prob(x, x, param="log"), "param is 'log'; want one of 'rate'"),
        (
            lambda: fastvae.negative_binomial_log_prob(x, x, x, param="logvar"),
            "param is 'logvar'; want one of 'mean', 'log'",
        ),
        (
            lambda: fastvae.negative_binomial_log_prob(x, x, x[:, :2]),
            r"shapes do not broadcast: x \[2, 3\], mean \[2, 3\], theta \[2, 2\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_every_gradient_of_broadcast_arguments(device: torch.device) -> None:
    generator = np.random.default_rng(0)
    x = torch.tensor(generator.poisson(2, (37, 50)), device=device)
    mean, theta, logits = (
        torch.tensor(generator.gamma(2, size=size), device=device).requires_grad_()
        for size in ((37, 1), (50,), ())
    )
    for module in (fastvae, reference):
        value = module.zero_inflated_negative_binomial_log_prob(x, mean, theta, logits)
        found = torch.autograd.grad(value.sum(), (mean, theta, logits))
        if module is fastvae:
            ours = found
    for got, want in zip(ours, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
