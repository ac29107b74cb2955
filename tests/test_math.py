"""The elementary functions of csrc/formulas keep the error bounds that are written there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastvae import _C

mpmath = pytest.importorskip("mpmath")

FUNCTIONS = (
    "exp",
    "expm1",
    "exp_tail",
    "log",
    "softplus",
    "sigmoid",
    "log1p",
    "deviance",
    "log_of_ratio",
    "exp_up",
    "exp_down",
    "weight",
)
BOUNDS = {  # units in the last place
    np.float32: dict(
        zip(FUNCTIONS, (1.0, 1.5, 8.0, 1.0, 2.0, 2.0, 1.5, 8.0, 1.5, 2.5, 2.5, 1.0), strict=True)
    ),
    np.float64: dict(
        zip(FUNCTIONS, (1.0, 2.5, 10.0, 1.0, 2.0, 2.0, 1.0, 8.0, 1.0, 2.5, 2.5, 1.5), strict=True)
    ),
}
DOORS: dict[type, Callable[[np.ndarray], list[np.ndarray]]] = {
    np.float32: _C._elementary_float,
    np.float64: _C._elementary_double,
}
RIGHT: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "exp_tail": lambda t: mpmath.expm1(t) - t,
    "log": mpmath.log,
    "softplus": lambda t: mpmath.log1p(mpmath.exp(t)),
    "sigmoid": lambda t: 1 / (1 + mpmath.exp(-t)),
    "log1p": mpmath.log1p,
    "deviance": lambda v: v - mpmath.log1p(v),
    "log_of_ratio": mpmath.log1p,
    "exp_up": mpmath.exp,
    "exp_down": lambda t: mpmath.exp(-t),
    "weight": lambda q: mpmath.power(2, -q),
}
GAMMA: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {
    "stirling": lambda z: (
        mpmath.loggamma(z) - (z - 0.5) * mpmath.log(z) + z - mpmath.log(2 * mpmath.pi) / 2
    ),
    "digamma_gap": lambda z: mpmath.log(z) - mpmath.digamma(z),
}
each_real = pytest.mark.parametrize("real", DOORS, ids=lambda real: real.__name__)
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def evaluate(name: str, x: np.ndarray) -> np.ndarray:
    return DOORS[x.dtype.type](x)[(*FUNCTIONS, *GAMMA).index(name)]


def domain(name: str, real: type) -> np.ndarray:
    """Points over the whole domain, dense where the formulas change."""
    rng = np.random.default_rng(0)
    info = np.finfo(real)
    if name == "log":
        exponents = rng.uniform(np.log2(float(info.tiny)), np.log2(float(info.max)), 4000)
        near_one = 1 + rng.uniform(-1, 1, 2000) * 10.0 ** rng.uniform(-8, 0, 2000)
        subnormal = float(info.smallest_subnormal) * rng.integers(1, 2**20, 500)
        edges = np.array([0.5**0.5, 2**0.5, 1, float(info.tiny), float(info.max)])
        x = np.concatenate([2.0**exponents, near_one, subnormal, edges])
    elif name in ("deviance", "log_of_ratio"):
        small = 10.0 ** rng.uniform(-9, -0.6, 3000) * rng.choice([-1, 1], 3000)
        x = np.concatenate([small, rng.integers(1, 2**16, 3000) / 2**12 - 1])
    elif name == "weight":  # 0 beyond
        x = rng.uniform(0, 86 if real is np.float32 else 430, 5000)
        x = np.concatenate([x, 2.0 ** rng.uniform(-40, 0, 2000), rng.integers(0, 160, 2000) / 2])
        x = x[x < (86 if real is np.float32 else 430)]
    elif name == "log1p":
        small = 2.0 ** rng.uniform(np.log2(float(info.smallest_subnormal)), 0, 3000)
        edges = np.array([0, 1, 2**0.5 - 1, float(info.smallest_subnormal)])
        x = np.concatenate([rng.uniform(0, 1, 4000), small, edges])
    else:
        bottom, top = np.log(float(info.tiny)), np.log(float(info.max))
        tiny = 10.0 ** rng.uniform(-15 if real is np.float32 else -100, 0, 3000)
        around = np.log(2) / 2 * rng.integers(-9, 10, 2000) + rng.normal(0, 1e-3, 2000)
        x = np.concatenate([rng.uniform(bottom, top, 4000), tiny, -tiny, around])
        worst = rng.uniform(0.3, 0.5, 2000)
        x = np.concatenate([x, rng.uniform(-3, 3, 1000), worst, -worst])
        if name in ("exp_up", "exp_down"):
            x = x[np.abs(x) < min(-bottom, top) - 1]
    return x.astype(real)


def errors(results: np.ndarray, name: str, x: np.ndarray) -> np.ndarray:
    """In units in the last place of the right result, against 60 digits (the tail cancels)."""
    with mpmath.workdps(250):
        right = [RIGHT[name](mpmath.mpf(float(t))) for t in x]
        spacing = np.spacing(np.abs(np.array([float(y) for y in right], x.dtype)))
        return np.array(
            [
                float(abs(mpmath.mpf(float(y)) - z) / float(ulp))
                for y, z, ulp in zip(results, right, spacing, strict=True)
            ]
        )


@each_real
@each_function
def test_error_bounds(real: type, name: str) -> None:
    x = domain(name, real)
    found = errors(evaluate(name, x), name, x)
    worst = found.argmax()
    assert found[worst] <= BOUNDS[real][name], f"{name}({x[worst]!r}) is off by {found[worst]} ulp"


@each_real
@each_function
def test_error_bounds_reject_what_is_just_outside(real: type, name: str) -> None:
    x = domain(name, real)[:200]
    y = evaluate(name, x)
    off = y + np.spacing(np.abs(y)) * real(2 * BOUNDS[real][name])
    assert errors(off, name, x).max() > BOUNDS[real][name]


@each_real
def test_exp_where_the_result_leaves_the_normal_range(real: type) -> None:
    info = np.finfo(real)
    x = np.linspace(np.log(float(info.smallest_subnormal)) - 2, np.log(float(info.tiny)), 500)
    x = x.astype(real)
    assert errors(evaluate("exp", x), "exp", x).max() <= 1
    largest = np.log(info.max).astype(real)
    below = np.array([np.nextafter(largest, real(0))])
    assert errors(evaluate("exp", below), "exp", below)[0] <= 1
    assert np.isposinf(evaluate("exp", np.array([largest * real(1.0001)])))


@each_real
def test_special_values(real: type) -> None:
    inf, nan, huge, tiny = np.inf, np.nan, np.finfo(real).max, np.finfo(real).smallest_subnormal
    x = np.array([0.0, -0.0, inf, -inf, nan, huge, -huge, tiny, -tiny], real)
    special = {
        "exp": [1, 1, inf, 0, nan, inf, 0, 1, 1],
        "expm1": [0, 0, inf, -1, nan, inf, -1, tiny, -tiny],
        "exp_tail": [0, 0, inf, inf, nan, inf, huge, 0, 0],
        "log": [-inf, -inf, inf, nan, nan, np.log(huge), nan, np.log(tiny), nan],
        "softplus": [np.log(2), np.log(2), inf, 0, nan, huge, 0, np.log(2), np.log(2)],
        "sigmoid": [0.5, 0.5, 1, 0, nan, 1, 0, 0.5, 0.5],
    }
    for name, right in special.items():
        np.testing.assert_allclose(
            evaluate(name, x), np.array(right, real), rtol=np.finfo(real).eps, err_msg=name
        )


@each_real
def test_the_tail_is_never_negative(real: type) -> None:
    x = np.concatenate([domain("exp_tail", real), np.linspace(-2, 2, 100001).astype(real)])
    assert (evaluate("exp_tail", x) >= 0).all()


@each_real
@pytest.mark.parametrize("name", GAMMA)
def test_what_is_left_of_gamma_functions(real: type, name: str) -> None:
    """To some roundings of the value or of 1, whichever is larger."""
    rng = np.random.default_rng(0)
    x = np.concatenate([10.0 ** rng.uniform(-6, 10, 500), rng.uniform(0.9, 1.1, 100), [1, 2]])
    x = x.astype(real)
    with mpmath.workdps(40):
        right = [GAMMA[name](mpmath.mpf(float(z))) for z in x]
    found = max(
        float(abs(y - mpmath.mpf(float(z)))) / max(1, abs(float(y)))
        for y, z in zip(right, evaluate(name, x), strict=True)
    )
    bound = 3e-7 if real is np.float32 else 1e-15
    assert found <= bound
    assert found > bound / 100  # the bound is not idle
