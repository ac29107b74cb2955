"""Rows against components: all pairs, mixtures, and the aggregate posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import seeded
from torch import Tensor

import fastvae
from fastvae import reference

pytestmark = pytest.mark.usefixtures("on_device")

PARAMS = ("logvar", "log_std", "std", "var")


def components(
    rows: int, k: int, size: int, *, far: float = 0.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """z, mu, logvar and log-weights; with `far`, so much further away from all."""
    generator = torch.Generator().manual_seed(rows * 10000 + k * 100 + size)
    made = {"generator": generator, "dtype": torch.float64, "device": "cpu"}  # the same everywhere
    z, mu, s = (torch.randn(n, size, **made) for n in (rows, k, k))
    log_w = torch.log_softmax(torch.randn(k, **made), 0)
    tensors = (z * (1 + far) + 3 * far, mu, s / 2, log_w)
    return [t.to(torch.get_default_device(), dtype) for t in tensors]


def in_param(logvar: Tensor, param: str) -> Tensor:
    return {
        "logvar": logvar,
        "log_std": logvar / 2,
        "std": (logvar / 2).exp(),
        "var": logvar.exp(),
    }[param]


def gradients(f: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = f(*leaves)
    generator = seeded(7)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return y.detach(), torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def assert_close(found: Tensor, exact: Tensor, bound: float) -> None:
    """In relation to the largest."""
    assert found.shape == exact.shape
    error = (found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)
    assert error <= bound, f"{error:.2e} > {bound:.0e}"


def exact(name: str, *tensors: Tensor, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """By the definition in float64, and by autograd through it."""
    function = getattr(reference, name)
    return gradients(lambda *t: function(*t, **options), *(t.double() for t in tensors))


def aggregate(*tensors: Tensor, **options: Any) -> Tensor:
    return torch.stack(fastvae.aggregate_log_prob(*tensors, **options))


SIZES = (
    (1, 1, 1),
    (5, 3, 2),
    (4, 16, 8),
    (13, 37, 40),
    (67, 17, 9),
    (130, 33, 1),
    (32, 200, 64),
)
# Of values, of gradients. Eager float32 has 3e-6 and more for the gradients of the last sizes; in
# float64 the definition's own rounding shows.
BOUNDS = {torch.float32: (2e-7, 1.5e-6), torch.float64: (1e-14, 1e-12)}


@pytest.mark.parametrize("far", [0.0, 30.0], ids=["near", "far"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", ["pairwise_log_prob", "mixture_log_prob"])
def test_values_and_gradients(
    name: str, dtype: torch.dtype, sizes: tuple[int, int, int], far: float
) -> None:
    tensors = components(*sizes, far=far, dtype=dtype)
    tensors = tensors if name == "mixture_log_prob" else tensors[:3]
    value, grads = gradients(getattr(fastvae, name), *tensors)
    exact_value, exact_grads = exact(name, *tensors)
    of_values, of_gradients = BOUNDS[dtype]
    assert value.dtype == dtype
    assert_close(value, exact_value, of_values)
    for found, right in zip(grads, exact_grads, strict=True):
        assert_close(found, right, of_gradients)


@pytest.mark.parametrize("far", [0.0, 30.0], ids=["near", "far"])
@pytest.mark.parametrize("sizes", [(2, 1), (50, 7), (16, 1), (131, 5)], ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("estimator", ["mss", "mws"])
def test_aggregate(estimator: str, dtype: torch.dtype, sizes: tuple[int, int], far: float) -> None:
    tensors = components(sizes[0], *sizes, far=far, dtype=dtype)[:3]
    options = {"dataset_size": 1000, "estimator": estimator}
    value, grads = gradients(lambda *t: aggregate(*t, **options), *tensors)
    with fastvae.use_backend("reference"):
        exact_value, exact_grads = gradients(
            lambda *t: aggregate(*t, **options), *(t.double() for t in tensors)
        )
    of_values, of_gradients = BOUNDS[dtype]
    assert_close(value, exact_value, of_values)
    for found, right in zip(grads, exact_grads, strict=True):
        assert_close(found, right, of_gradients)


def test_product_of_matrices_fails_the_same_test() -> None:
    """What is faster to write: z^2 - 2 z mu + mu^2, by matrix products."""

    def expanded(z: Tensor, mu: Tensor, logvar: Tensor, log_w: Tensor) -> Tensor:
        precision = torch.exp(-logvar)
        squares = z**2 @ precision.T - 2 * z @ (mu * precision).T + (mu**2 * precision).sum(-1)
        constant = logvar.sum(-1) + z.shape[-1] * math.log(2 * math.pi)
        return torch.logsumexp(-0.5 * (squares + constant) + log_w, -1)

    tensors = components(32, 200, 64)
    shifted = [tensors[0] + 100, tensors[1] + 100, *tensors[2:]]  # nothing but another origin
    _, found = gradients(expanded, *shifted)
    _, right = exact("mixture_log_prob", *shifted)
    with pytest.raises(AssertionError):
        assert_close(found[0], right[0], BOUNDS[torch.float32][1])
    _, ours = gradients(fastvae.mixture_log_prob, *shifted)
    assert_close(ours[0], right[0], BOUNDS[torch.float32][1])


def test_one_dominates_and_none_does() -> None:
    z = torch.zeros(2, 3)
    mu = torch.stack([torch.zeros(3), torch.full((3,), 500.0)])
    logvar = torch.zeros(2, 3)
    assert_close(
        fastvae.mixture_log_prob(z, mu, logvar), exact("mixture_log_prob", z, mu, logvar)[0], 1e-7
    )
    twice, grads = gradients(fastvae.mixture_log_prob, z, torch.zeros(2, 3), logvar)
    assert torch.equal(twice, fastvae.gaussian_log_prob(z, 0.0, 0.0))
    assert torch.equal(grads[0], torch.zeros(2, 3))


# ---- Arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("param", PARAMS)
def test_params(param: str) -> None:
    z, mu, logvar, log_w = components(9, 20, 5)
    s = in_param(logvar, param)
    value, grads = gradients(lambda *t: fastvae.mixture_log_prob(*t, param=param), z, mu, s, log_w)
    exact_value, exact_grads = exact("mixture_log_prob", z, mu, s, log_w, param=param)
    assert_close(value, exact_value, 2e-7)
    for found, right in zip(grads, exact_grads, strict=True):
        assert_close(found, right, 1.5e-6)


@pytest.mark.parametrize("kind", ["hard", "soft", "straight_through"])
def test_bound(kind: str) -> None:
    bound = fastvae.Bound(-0.3, 0.4, kind)
    tensors = components(9, 20, 5)
    _, grads = gradients(lambda *t: fastvae.mixture_log_prob(*t, bound=bound), *tensors)
    _, right = exact("mixture_log_prob", *tensors, bound=bound)
    for a, b in zip(grads, right, strict=True):
        assert_close(a, b, 1.5e-6)


def test_shapes_broadcast_within_components_and_z_has_any() -> None:
    z, mu, logvar, _ = components(12, 6, 8)
    whole = fastvae.pairwise_log_prob(z, mu, logvar)
    assert torch.equal(
        fastvae.pairwise_log_prob(
            z.reshape(3, 4, 2, 4), mu.reshape(6, 2, 4), logvar.reshape(6, 2, 4)
        ),
        whole.reshape(3, 4, 6),
    )
    assert fastvae.mixture_log_prob(z.reshape(3, 4, 8), mu, logvar).shape == (3, 4)
    same = fastvae.pairwise_log_prob(z, mu, logvar[0].expand(6, 8))
    assert torch.equal(fastvae.pairwise_log_prob(z, mu, logvar[0]), same)
    one = fastvae.pairwise_log_prob(z, mu, 0.5)
    assert torch.equal(one, fastvae.pairwise_log_prob(z, mu, torch.full_like(mu, 0.5)))
    single = fastvae.mixture_log_prob(z[:, 0], mu[:, 0], logvar[:, 0], event_ndim=0)
    assert torch.equal(single, fastvae.mixture_log_prob(z[:, :1], mu[:, :1], logvar[:, :1]))
    assert fastvae.mixture_log_prob(z[0], mu, logvar).shape == ()


def test_strides_do_not_matter() -> None:
    tensors = components(12, 20, 8)
    lying = [t.T.contiguous().T if t.dim() == 2 else t for t in tensors]
    plain, grads = gradients(fastvae.mixture_log_prob, *tensors)
    other, other_grads = gradients(fastvae.mixture_log_prob, *lying)
    assert torch.equal(plain, other)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
    expanded = fastvae.mixture_log_prob(tensors[0][:1].expand(12, 8), *tensors[1:])
    assert torch.equal(expanded, plain[:1].expand(12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in components(12, 20, 8)]
    value, grads = gradients(fastvae.mixture_log_prob, *tensors)
    wide, wide_grads = gradients(fastvae.mixture_log_prob, *(t.float() for t in tensors))
    assert value.dtype == torch.float32
    assert torch.equal(value, wide)
    for narrow, right in zip(grads, wide_grads, strict=True):
        assert narrow.dtype == dtype
        assert torch.equal(narrow, right.to(dtype))


def test_dtypes_promote() -> None:
    z, mu, logvar, log_w = components(12, 20, 8)
    assert fastvae.mixture_log_prob(z, mu, logvar, log_w.double()).dtype == torch.float64


def test_empty() -> None:
    z, mu, logvar, log_w = components(3, 5, 4)
    value, grads = gradients(fastvae.mixture_log_prob, z[:0], mu, logvar, log_w)
    assert value.shape == (0,)
    assert [g.shape for g in grads] == [(0, 4), (5, 4), (5, 4), (5,)]
    assert all((g == 0).all() for g in grads)
    none = fastvae.mixture_log_prob(z[:, :0], mu[:, :0], logvar[:, :0], log_w)
    assert_close(none, torch.zeros(3, dtype=torch.float64) + 1e-9, 200.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, m, s, w: fastvae.mixture_log_prob(z[:, :3], m, s), ValueError, "z has shape"),
        (
            lambda z, m, s, w: fastvae.mixture_log_prob(z, m, s, w[:3]),
            ValueError,
            "log_weights has",
        ),
        (lambda z, m, s, w: fastvae.mixture_log_prob(z, m, s, 0.5), TypeError, "log_weights is"),
        (lambda z, m, s, w: fastvae.mixture_log_prob(0.5, m, s), TypeError, "z is a float"),
        (lambda z, m, s, w: fastvae.mixture_log_prob(z, 0.0, 0.0), ValueError, "no dimension"),
        (lambda z, m, s, w: fastvae.mixture_log_prob(z, m[:0], s[:0]), ValueError, "at least one"),
        (lambda z, m, s, w: fastvae.mixture_log_prob(z, m, s, event_ndim=2), ValueError, "before"),
        (lambda z, m, s, w: fastvae.mixture_log_prob(z, m, s, param="sd"), ValueError, "param is"),
        (lambda z, m, s, w: fastvae.mixture_log_prob(z, m, s, bound=3), TypeError, "bound is"),
        (lambda z, m, s, w: fastvae.mixture_log_prob(z.cfloat(), m, s), TypeError, "z has dtype"),
        (lambda z, m, s, w: fastvae.aggregate_log_prob(z, m, s), ValueError, "one z for each"),
        (
            lambda z, m, s, w: fastvae.aggregate_log_prob(m, m, s, dataset_size=3),
            ValueError,
            "at least the batch's",
        ),
        (
            lambda z, m, s, w: fastvae.aggregate_log_prob(m, m, s, estimator="x"),
            ValueError,
            "estimator is",
        ),
        (
            lambda z, m, s, w: fastvae.aggregate_log_prob(m[:1], m[:1], s[:1], dataset_size=3),
            ValueError,
            "nothing of the others",
        ),
    ],
)
def test_errors(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*components(7, 5, 4))


@pytest.mark.parametrize("where", ["z", "mu", "logvar", "log_weights"])
def test_nan_comes_out(where: str) -> None:
    tensors = components(3, 20, 4)
    k = ("z", "mu", "logvar", "log_weights").index(where)
    tensors[k].view(-1)[0] = math.nan
    values = [fastvae.mixture_log_prob(*tensors)]
    if where != "log_weights":
        values.append(fastvae.pairwise_log_prob(*tensors[:3])[:, 0])
        values += fastvae.aggregate_log_prob(tensors[1], *tensors[1:3]) if where != "z" else ()
    for value in values:
        assert value[0].isnan()
        assert value[1:].isnan().all() == (where != "z")


def test_weights_of_zero() -> None:
    z, mu, logvar, log_w = components(3, 20, 4)
    log_w[5:] = -math.inf
    value, grads = gradients(fastvae.mixture_log_prob, z, mu, logvar, log_w)
    few = fastvae.mixture_log_prob(z, mu[:5], logvar[:5], log_w[:5])
    assert_close(value, few.double(), 1e-7)
    assert all((g[5:] == 0).all() for g in grads[1:])
    assert all(g.isfinite().all() for g in grads)
    value, grads = gradients(
        fastvae.mixture_log_prob, z, mu, logvar, torch.full_like(log_w, -math.inf)
    )
    assert (value == -math.inf).all()
    assert all((g == 0).all() for g in grads)


def test_a_component_beyond_all_numbers_weighs_nothing() -> None:
    """Its square is infinite in float32, which must not become what infinity less itself is."""
    z, mu, logvar, log_w = components(9, 20, 12)
    mu[3, 2], logvar[5] = 1e30, -120.0
    value, grads = gradients(fastvae.mixture_log_prob, z, mu, logvar, log_w)
    exact_value, exact_grads = exact("mixture_log_prob", z, mu, logvar, log_w)
    assert_close(value, exact_value, 2e-7)
    for found, right in zip(grads, exact_grads, strict=True):
        assert_close(found, right, 1.5e-6)


# ---- As other ops --------------------------------------------------------------------------------


def test_second_derivatives() -> None:
    tensors = components(3, 4, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(fastvae.mixture_log_prob, leaves)
    assert torch.autograd.gradgradcheck(fastvae.pairwise_log_prob, leaves[:3])


def test_functional_transforms() -> None:
    z, mu, logvar, log_w = components(6, 4, 3)
    alone = torch.func.vmap(lambda row: fastvae.mixture_log_prob(row, mu, logvar, log_w))(z)
    torch.testing.assert_close(alone, fastvae.mixture_log_prob(z, mu, logvar, log_w))
    found = torch.func.grad(lambda t: fastvae.mixture_log_prob(t, mu, logvar).sum())(z)
    _, (right, *_) = exact("mixture_log_prob", z, mu, logvar)
    ones = torch.autograd.grad(
        fastvae.mixture_log_prob(leaf := z.clone().requires_grad_(), mu, logvar).sum(), leaf
    )[0]
    torch.testing.assert_close(found, ones)
    assert right.shape == found.shape


@pytest.mark.parametrize("name", ["pairwise_log_prob", "mixture_log_prob"])
def test_operators_are_registered_as_pytorch_wants(name: str) -> None:
    if not fastvae.backend.HAS_BINARY:
        pytest.skip("no binary")
    tensors = [t.requires_grad_() for t in components(6, 4, 3)]
    settings: list[Any] = [0]
    if name == "mixture_log_prob":
        settings += [False, 0.0, 0.0]
    operands = tensors if name == "mixture_log_prob" else tensors[:3]
    forward = getattr(torch.ops.fastvae, name).default
    backward = getattr(torch.ops.fastvae, f"{name}_backward").default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (*operands, *settings), test_utils=tests)
    grad = torch.ones(6, 4) if name == "pairwise_log_prob" else torch.ones(6)
    plain = [t.detach() for t in operands]
    kept = forward(*plain, *settings)[1:] if name == "mixture_log_prob" else ()
    torch.library.opcheck(backward, (grad, *plain, *kept, *settings, 7), test_utils=tests)


@pytest.mark.parametrize("marginals", [False, True])
def test_what_backward_is_given_of_forward_is_checked(marginals: bool) -> None:
    """A direct call with less would read foreign memory."""
    if not fastvae.backend.HAS_BINARY:
        pytest.skip("no binary")
    tensors, settings = components(6, 4, 3), (0, marginals, 0.0, 0.0)
    value, log_sums = torch.ops.fastvae.mixture_log_prob(*tensors, *settings)
    assert log_sums.shape == ((3, 6) if marginals else (6,))
    if not marginals:
        assert torch.equal(log_sums.to(value.dtype), value)
    backward = torch.ops.fastvae.mixture_log_prob_backward
    assert backward(value, *tensors, log_sums, *settings, 15)[0].shape == (6, 3)
    for wrong, message in (
        (log_sums[..., :5], r"log_sums has shape \[.*5\], want \[.*6\]"),
        (log_sums.float(), "log_sums has another dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(value, *tensors, wrong, *settings, 15)


def test_compile() -> None:
    tensors = components(6, 4, 3)
    compiled = torch.compile(fastvae.mixture_log_prob, fullgraph=True, backend="aot_eager")
    value, grads = gradients(compiled, *tensors)
    eager, eager_grads = gradients(fastvae.mixture_log_prob, *tensors)
    assert torch.equal(value, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, eager_grads, strict=True))


def test_threads_and_halves_of_the_batch_change_no_bit() -> None:
    """Each row's value is its own; sums over rows are taken in one order."""
    tensors = components(200, 70, 20)
    whole, grads = gradients(fastvae.mixture_log_prob, *tensors)
    assert torch.equal(whole[100:], fastvae.mixture_log_prob(tensors[0][100:], *tensors[1:]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again, again_grads = gradients(fastvae.mixture_log_prob, *tensors)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))


def test_only_wanted_gradients_are_made() -> None:
    z, mu, logvar, log_w = components(6, 20, 3)
    _, right = gradients(fastvae.mixture_log_prob, z, mu, logvar, log_w)
    for wanted in range(4):
        leaves = [
            t.clone().requires_grad_(k == wanted) for k, t in enumerate((z, mu, logvar, log_w))
        ]
        y = fastvae.mixture_log_prob(*leaves)
        generator = seeded(7)
        upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).float()
        (found,) = torch.autograd.grad(y, leaves[wanted], upstream)
        assert torch.equal(found, right[wanted])


def peak_of(call: Callable[[], Any]) -> float:
    """MB by which the device's memory, or the process's, was larger meanwhile."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - allocated) / 1e6
    status = Path("/proc/self/status")

    def read(name: str) -> float:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1000

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on: proc(5)
    except OSError:
        pytest.skip("the kernel does not let its peak be read")
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def test_memory_is_not_for_every_pair() -> None:
    """Of 4000 rows and 8000 components one number for each pair takes 128 MB."""
    if not fastvae.backend.native_enabled():
        pytest.skip("the definition makes a tensor of all")
    if "host" in str((fastvae.info()["build"] or {}).get("cuda_version")):
        pytest.skip("threads that are fibers take minutes")
    z, mu, logvar, log_w = (t.requires_grad_() for t in components(4000, 8000, 8))
    fastvae.mixture_log_prob(z[:8], mu, logvar, log_w).sum().backward()  # what is needed once

    def every_pair() -> Tensor:
        return torch.logsumexp(fastvae.pairwise_log_prob(z, mu, logvar).detach() + log_w, 1)

    assert peak_of(every_pair) > 120
    assert peak_of(lambda: fastvae.mixture_log_prob(z, mu, logvar, log_w).sum().backward()) < 30
