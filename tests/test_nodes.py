"""The nodes of autograd's graph in C++: what they take, and what they give."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OPS, Op, op_id
from torch import Tensor

import fastvae
from fastvae import backend, ops
from fastvae.ops.op import OPS as DECLARED

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not backend.nodes(), reason="the library of nodes is not there")

M = torch.zeros(4, 6)
HALF = M.half()
SEEDS = torch.arange(4)


class Subclass(Tensor):
    pass


def ordinary(name: str, *args: Any, **kwargs: Any) -> Any:
    return DECLARED[name].ordinary_call(args, kwargs)


@pytest.mark.parametrize("op", OPS, ids=op_id)
def test_ordinary_calls_are_taken(op: Op) -> None:
    """Every op of the table; without this, all else could pass by way of Python's Functions."""
    tensors = op.inputs((4, 20))
    options = dict(op.options, seed=torch.tensor(3)) if op.draws else op.options
    found = ordinary(op.function, *tensors, **options)
    assert found is not NotImplemented
    right = getattr(fastvae.reference, op.function)(*tensors, **options)
    found, right = (y if isinstance(y, tuple) else (y,) for y in (found, right))
    for y, value in zip(found, right, strict=True):
        torch.testing.assert_close(y, value)


# Calls that are not ordinary, and what the public function makes of them: an error, or a result.
UNUSUAL: dict[str, tuple[Callable[[], Any], Callable[[], Any], type[Exception] | None]] = {
    name: (
        lambda name=function, a=a, k=k: ordinary(name, *a, **k),
        lambda name=function, a=a, k=k: getattr(fastvae, name)(*a, **k),
        error,
    )
    for name, function, a, k, error in (
        ("an int seed", "rsample", (M, M), {"seed": 1}, None),
        ("a seed a row", "rsample", (M, M), {"seed": SEEDS}, None),
        ("a seed of int32", "rsample", (M, M), {"seed": SEEDS[0].int()}, TypeError),
        ("a generator", "rsample", (M, M), {"generator": torch.Generator()}, None),
        ("a list of samples", "rsample", (M, M), {"sample_shape": [2]}, None),
        ("negative samples", "rsample", (M, M), {"sample_shape": (-2,)}, ValueError),
        ("a number", "rsample", (M, 0.5), {}, None),
        ("two numbers", "rsample", (0.5, 0.5), {}, None),
        ("integers", "kl_divergence", (SEEDS, SEEDS), {}, None),
        ("two dtypes", "kl_divergence", (M, HALF), {}, None),
        ("two devices", "kl_divergence", (M, M.to("meta")), {}, ValueError),
        ("two shapes", "kl_divergence", (M, M[:3]), {}, ValueError),
        ("half a prior", "kl_divergence", (M, M, M), {}, ValueError),
        ("the other half", "kl_divergence", (M, M), {"prior_logvar": M}, ValueError),
        ("another param", "kl_divergence", (M, M), {"param": "sd"}, ValueError),
        ("no param", "kl_divergence", (M, M), {"param": None}, ValueError),
        ("an event too large", "kl_divergence", (M, M), {"event_ndim": 3}, ValueError),
        ("a negative event", "kl_divergence", (M, M), {"event_ndim": -1}, ValueError),
        ("an event of True", "kl_divergence", (M, M), {"event_ndim": True}, TypeError),
        (
            "a bound of a std",
            "rsample",
            (M, M),
            {"bound": fastvae.Bound(), "param": "std"},
            ValueError,
        ),
        ("a bound that is none", "rsample", (M, M), {"bound": (0, 1, 2)}, TypeError),
        ("one level", "discretized_logistic_log_prob", (M, M, M), {"bins": 1}, ValueError),
        ("an argument too many", "bernoulli_log_prob", (M, M, 1), {}, TypeError),
        ("an argument twice", "bernoulli_log_prob", (M, M), {"x": M}, TypeError),
        ("an argument too few", "bernoulli_log_prob", (M,), {}, TypeError),
        ("an unknown argument", "bernoulli_log_prob", (M, M), {"reduction": "sum"}, TypeError),
        ("a scale of None", "laplace_log_prob", (M, M, None), {}, TypeError),
        ("a list", "bernoulli_log_prob", ([0.0], M), {}, TypeError),
        ("a sparse tensor", "bernoulli_log_prob", (M.to_sparse(), M.to_sparse()), {}, Exception),
        ("a meta tensor", "bernoulli_log_prob", (M.to("meta"), M.to("meta")), {}, None),
        ("a subclass", "bernoulli_log_prob", (M.as_subclass(Subclass), M), {}, None),
    )
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_all_else_is_left_to_the_checks(name: str) -> None:
    take, call, error = UNUSUAL[name]
    assert take() is NotImplemented
    if error is None:
        call()
    else:
        with pytest.raises(error):
            call()


def test_nothing_is_taken_from_modes_and_transforms() -> None:
    from torch.autograd import forward_ad
    from torch.utils.flop_counter import FlopCounterMode

    taken = []

    def take(t: Tensor) -> Tensor:
        taken.append(ordinary("bernoulli_log_prob", t, t) is not NotImplemented)
        return t

    take(M)
    torch.vmap(take)(M[None])
    torch.func.grad(lambda t: take(t).sum())(M)
    with FlopCounterMode(display=False):
        take(M)
    with torch.device("meta"):
        take(M)
    with forward_ad.dual_level():
        take(forward_ad.make_dual(M, M))
        take(M)
    take(M)
    assert taken == [True, False, False, False, False, False, True, True]


# ---- Seeds ---------------------------------------------------------------------------------------


def test_the_seed_is_the_one_that_pytorch_draws() -> None:
    for start in (0, 1, 2**40):
        torch.manual_seed(start)
        found = [ordinary("rsample", M, M) for _ in range(3)]
        state = torch.get_rng_state()
        torch.manual_seed(start)
        seeds = [torch.empty((), dtype=torch.int64).random_() for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), state)
        assert all(
            torch.equal(z, fastvae.rsample(M, M, seed=s)) for z, s in zip(found, seeds, strict=True)
        )


# ---- Graphs --------------------------------------------------------------------------------------


def leaves() -> list[Tensor]:
    return [torch.randn(4, 6, requires_grad=True) for _ in range(2)]


def test_names_of_nodes() -> None:
    mu, logvar = leaves()
    z, kl = fastvae.rsample_kl(mu, logvar)
    assert z.grad_fn is kl.grad_fn
    assert z.grad_fn.name() == "RsampleKlBackward"
    assert fastvae.laplace_log_prob(mu, logvar).grad_fn.name() == "LaplaceLogProbBackward"


def test_a_second_backward_is_refused_unless_the_graph_is_kept() -> None:
    for loss in (
        lambda mu, logvar: fastvae.kl_divergence(mu, logvar).sum(),
        lambda mu, logvar: fastvae.gaussian_nll_loss(mu, logvar),
    ):
        mu, logvar = leaves()
        y = loss(mu, logvar)
        first = torch.autograd.grad(y, (mu, logvar), retain_graph=True)
        first = [g.clone() for g in first]
        for again, before in zip(torch.autograd.grad(y, (mu, logvar)), first, strict=True):
            torch.testing.assert_close(again, before)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, (mu, logvar))


def test_an_operand_changed_in_place_is_noticed() -> None:
    mu, logvar = leaves()
    changed = logvar.clone()
    kl = fastvae.kl_divergence(mu, changed)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.sum().backward()


def test_an_error_in_the_definition_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    mu, logvar = leaves()
    kl = fastvae.kl_divergence(mu, logvar).sum()

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(DECLARED["kl_divergence"]._definition, "function", broken)
    with pytest.raises(ZeroDivisionError, match="here"):
        torch.autograd.grad(kl, mu, create_graph=True)


def test_hooks_and_anomaly_mode() -> None:
    mu, logvar = leaves()
    seen = []
    z, kl = fastvae.rsample_kl(mu, logvar)
    z.grad_fn.register_hook(lambda grads, _: seen.append(len(grads)))
    z.grad_fn.register_prehook(lambda grads: seen.append([g is None for g in grads]))
    kl.sum().backward()
    assert seen == [[True, False], 2]
    broken = torch.full((4, 6), math.nan, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        kl = fastvae.kl_divergence(mu, broken).sum()
        with pytest.raises(RuntimeError, match="KlDivergenceBackward"):
            kl.backward()


def test_backward_on_another_thread() -> None:
    mu, logvar = leaves()
    kl = fastvae.kl_divergence(mu, logvar).sum()
    right = torch.autograd.grad(kl, mu, retain_graph=True)[0]
    found: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: found.extend(torch.autograd.grad(kl, mu, create_graph=True))
    )
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], right)


def test_compiled_autograd() -> None:
    mu, logvar = leaves()

    def loss() -> Tensor:
        z, kl = fastvae.rsample_kl(mu, logvar, seed=torch.tensor(3))
        return kl.sum() + z.square().sum() + fastvae.gaussian_nll_loss(mu, logvar)

    right = torch.autograd.grad(loss(), (mu, logvar))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss().backward()
    for leaf, want in zip((mu, logvar), right, strict=True):
        torch.testing.assert_close(leaf.grad, want)


def test_nothing_is_leaked() -> None:
    mu, logvar = leaves()

    def step() -> None:
        z, kl = fastvae.rsample_kl(mu, logvar, bound=fastvae.Bound())
        (z.sum() + kl.sum()).backward()
        fastvae.gaussian_nll_loss(mu, logvar, 0.5, param="std", reduction="sum").backward()
        ordinary("rsample", M, HALF)
        mu.grad = logvar.grad = None

    step()
    gc.collect()  # what other tests left refers to None too
    before = sys.getrefcount(mu), sys.getrefcount(logvar), sys.getrefcount(None)
    for _ in range(1000):
        step()
    after = sys.getrefcount(mu), sys.getrefcount(logvar), sys.getrefcount(None)
    assert after[:2] == before[:2]
    assert abs(after[2] - before[2]) < 100


# ---- Without them --------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["nll_loss", "citizens", "packed"])
def test_python_functions_serve_where_they_are_not(table: str) -> None:
    """As under another torch than the library was built for."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, HERE / f"test_{table}.py"],
        env=os.environ | {"FASTVAE_NODES": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert ops.has_kernels(M)
