"""The patches of torch.distributions and of Pyro: the same values, gradients, errors and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    kl,
    kl_divergence,
    register_kl,
)

import fastvae.integrations.torch_distributions as integration
from fastvae.integrations import patching

B, D = 5, 3
early_log_prob = Normal.log_prob


def leaves(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, positive: bool = False) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (t.exp() if positive else t).to(dtype).requires_grad_()

    return {
        "loc": leaf(B, D),
        "scale": leaf(B, D, positive=True),
        "one": leaf(positive=True),
        "row": leaf(D, positive=True),
        "column": leaf(B, 1, positive=True),
        "x": leaf(B, D),
        "more": leaf(4, B, D),
    }


def prior(t: dict[str, Tensor]) -> Normal:
    return Normal(t["x"], t["row"])


VALUES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "log_prob": lambda t: Normal(t["loc"], t["scale"]).log_prob(t["x"]),
    "of more values": lambda t: Normal(t["loc"], t["scale"]).log_prob(t["more"]),
    "one scale": lambda t: Normal(t["loc"], t["one"]).log_prob(t["x"]),
    "a scale per column": lambda t: Normal(t["loc"], t["row"]).log_prob(t["x"]),
    "a scale per row": lambda t: Normal(t["loc"], t["column"]).log_prob(t["x"]),
    "a fixed scale": lambda t: Normal(t["loc"], 0.3).log_prob(t["x"]),
    "expanded": lambda t: Normal(t["loc"][0, 0], t["one"]).expand((B, D)).log_prob(t["x"][:1]),
    "event": lambda t: Independent(Normal(t["loc"], t["scale"]), 1).log_prob(t["more"]),
    "events of two": lambda t: Independent(Normal(t["loc"], t["one"]), 2).log_prob(t["more"]),
    "nested": lambda t: Independent(Independent(Normal(t["loc"], t["row"]), 1), 1).log_prob(
        t["more"]
    ),
    "log-normal": lambda t: LogNormal(t["loc"], t["scale"]).log_prob(t["x"].exp()),
    "half-normal": lambda t: HalfNormal(t["scale"]).log_prob(t["x"].abs()),
    "kl": lambda t: kl_divergence(Normal(t["loc"], t["scale"]), prior(t)),
    "kl to N(0, 1)": lambda t: kl_divergence(
        Normal(t["loc"], t["one"]), Normal(t["x"].new_zeros(()), 1.0)
    ),
    "kl of fewer": lambda t: kl_divergence(
        Normal(t["loc"][:1], t["one"]), Normal(0.0, t["one"]).expand((B, D))
    ),
    "kl of log-normals": lambda t: kl_divergence(
        LogNormal(t["loc"], t["scale"]), LogNormal(t["x"], t["row"])
    ),
    "kl of events": lambda t: kl_divergence(
        Independent(Normal(t["loc"], t["scale"]), 1), Independent(prior(t), 1)
    ),
    "no gradient through the scale": lambda t: Normal(t["loc"], t["one"].detach()).log_prob(t["x"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_and_gradients(name: str) -> None:
    of = VALUES[name]
    t = leaves()
    want = of(t)
    names = list(t)
    weight = torch.rand_like(want)
    right = torch.autograd.grad((weight * want).sum(), list(t.values()), allow_unused=True)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        t = leaves(dtype)
        with integration.patch() as patch:
            found = of(t)
        assert sum(patch.served.values()) >= 1
        assert found.dtype == dtype
        assert found.shape == want.shape
        grads = torch.autograd.grad(
            (weight.to(dtype) * found).sum(), list(t.values()), allow_unused=True
        )
        torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)
        for leaf, grad, wanted in zip(names, grads, right, strict=True):
            assert (grad is None) == (wanted is None), leaf
            if grad is not None:
                torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance)


def test_samples() -> None:
    t = leaves(torch.float32)
    q = Independent(Normal(t["loc"], t["one"]), 1)
    with integration.patch() as patch:
        torch.manual_seed(0)
        z = q.rsample((40_000,))
        torch.manual_seed(0)
        assert torch.equal(q.rsample((40_000,)), z)
        assert not q.sample().requires_grad
        one = Normal(torch.zeros(()), torch.ones(())).expand((20_000,)).rsample()
        assert abs(one.std() - 1) < 0.03  # not one number, expanded
    error = (z.mean(0) - t["loc"]).abs().max() / t["one"]
    assert error < 5 / 40_000**0.5
    assert ((z.std((0, 1)) / z.std()).log().abs() < 1).all()
    assert torch.isclose((z - t["loc"]).std(), t["one"], rtol=0.02)
    grads = torch.autograd.grad(z.sum(), (t["loc"], t["one"]))
    assert grads[0].eq(40_000).all()
    torch.testing.assert_close(grads[1], ((z - t["loc"]) / t["one"]).sum(), rtol=1e-2, atol=1)
    assert patch.served == {"Normal.rsample": 3, "Normal.sample": 1}


class Mine(Normal):
    """A subclass with a divergence and a density of its own."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.full_like(value, 7.0)


def test_what_is_not_served_goes_to_the_original() -> None:
    loc, scale = torch.randn(B, D), torch.rand(B, D) + 0.1
    half = Normal(loc.bfloat16(), scale.bfloat16())
    calls = {
        "half": lambda: half.log_prob(loc.bfloat16()),
        "half kl": lambda: kl_divergence(half, half),
        "mixed": lambda: Normal(loc, scale).log_prob(loc.double()),
        "integers": lambda: Normal(loc, scale).log_prob(torch.ones(B, D, dtype=torch.int64)),
        "a number": lambda: Normal(loc, scale, validate_args=False).log_prob(0.5),
        "meta": lambda: Normal(loc.to("meta"), 1.0, validate_args=False).log_prob(loc.to("meta")),
        "Laplace": lambda: Independent(Laplace(loc, scale), 1).log_prob(loc),
        "events of other sizes": lambda: kl_divergence(
            Independent(Laplace(loc, scale), 1), Independent(Laplace(loc, 1.0), 1)
        ),
    }
    for name, call in calls.items():
        want = call()
        with integration.patch() as patch:
            found = call()
        assert not patch.served, name
        assert patch.passed_on, name
        assert found.dtype == want.dtype, name
        if not found.is_meta:
            assert torch.equal(found, want), name
    with integration.patch() as patch:
        assert Independent(Mine(loc, scale), 1).log_prob(loc).eq(7 * D).all()
    assert not patch.served


def test_errors_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile switches it off
    q = Normal(torch.zeros(3), 1.0)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: q.log_prob(torch.full((3,), torch.nan)),
        lambda: q.log_prob(torch.zeros(2)),
        lambda: Normal(torch.zeros(3), 1.0, validate_args=False).log_prob(torch.zeros(2)),
        lambda: q.rsample(5),
        lambda: q.rsample((-1,)),
        lambda: kl_divergence(q, Normal(torch.zeros(2), 1.0)),
        lambda: Independent(q, 1).log_prob(torch.full((3,), torch.nan)),
    )
    for call in calls:
        with pytest.raises(Exception) as want:  # noqa: PT011  compared below
            call()
        with integration.patch(), pytest.raises(want.type):
            call()


def test_a_subclass_with_a_divergence_of_its_own_keeps_it() -> None:
    class Own(Normal):
        pass

    register_kl(Own, Own)(lambda p, q: torch.full_like(p.loc, 3.0))
    q = Own(torch.zeros(D), torch.ones(D))
    with integration.patch():
        assert kl_divergence(q, q).eq(3).all()
        assert kl_divergence(Independent(q, 1), Independent(q, 1)) == 3 * D
    del kl._KL_REGISTRY[Own, Own]
    kl._KL_MEMOIZE.clear()


def test_undoing_in_any_order() -> None:
    q = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    before = (Normal.log_prob, Normal.rsample, Independent.log_prob)
    registered = dict(kl._KL_REGISTRY)
    first, second = integration.patch(), integration.patch()
    assert Normal.log_prob is not early_log_prob
    first.undo()
    q.log_prob(torch.zeros(2))
    kl_divergence(q, q)
    assert not first.served
    assert second.served == {
        "Independent.log_prob": 1,
        "kl_divergence(Independent, Independent)": 1,
    }
    second.undo()  # puts back the first one's, which is no more than a way to the original
    q.log_prob(torch.zeros(2))
    q.rsample()
    assert not first.served
    assert sum(second.served.values()) == 2
    Normal.log_prob, Normal.rsample, Independent.log_prob = before
    for pair, function in registered.items():
        register_kl(*pair)(function)
    with integration.patch() as patch:
        q.log_prob(torch.zeros(2))
        assert "Independent.log_prob" in str(patch)
    assert (Normal.log_prob, Normal.rsample, Independent.log_prob) == before
    assert registered == kl._KL_REGISTRY


def test_traced_and_compiled() -> None:
    loc, scale, x = torch.randn(B, D), torch.rand(B, D) + 0.1, torch.randn(B, D)

    def log_prob(loc: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        return Normal(loc, scale, validate_args=False).log_prob(x)

    with integration.patch() as patch:
        traced = torch.jit.trace(log_prob, (loc, scale, x))
        torch.testing.assert_close(traced(x, scale, loc), log_prob(x, scale, loc))
        assert patch.passed_on["Normal.log_prob"] >= 1
        compiled = torch.compile(log_prob, backend="eager", fullgraph=True)
        compiled(loc, scale, x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                torch.testing.assert_close(compiled(x, scale, loc), log_prob(x, scale, loc))


def test_what_an_expanded_tensor_was_expanded_from() -> None:
    base = torch.rand(D, requires_grad=True)
    with torch.no_grad():
        constant = base.expand(B, D)
    for t, is_base in (
        (base.expand(B, D), True),
        (base.expand(4, 1, D).expand(4, B, D), True),
        (base[:1].expand(B, D), False),
        (base[0].expand(B, D), False),
        (base.detach().expand(B, D), False),
        (constant, False),
        (base.expand(B, D)[:, 0], False),
        (base.expand(D, D).t(), False),
    ):
        found = patching.shared(t)
        assert (found is base) == is_base
        torch.testing.assert_close(found.expand(t.shape), t)


# ---- Pyro ----------------------------------------------------------------------------------------


@pytest.fixture
def pyro() -> Any:
    package = pytest.importorskip("pyro")
    package.clear_param_store()
    package.set_rng_seed(0)
    return package


def program(pyro: Any, masked: bool = False) -> tuple[Any, Any, Tensor]:
    """A model and a guide, of a network's outputs and of one learned scale."""
    import pyro.distributions as dist

    x = torch.randn(8, 6)
    encoder, decoder = torch.nn.Linear(6, 4), torch.nn.Linear(2, 6)
    log_sigma = torch.nn.Parameter(torch.zeros(()))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.param("log_sigma", log_sigma)
        with pyro.plate("data", 8), pyro.poutine.scale(scale=0.5):
            p = dist.Normal(torch.zeros(8, 2), 1.0).to_event(1)
            z = pyro.sample("z", p.mask(x[:, 0] > 0) if masked else p)
            pyro.sample("x", dist.Normal(decoder(z), log_sigma.exp()).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", 8), pyro.poutine.scale(scale=0.5):
            loc, log_scale = encoder(x).chunk(2, -1)
            q = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", q.mask(x[:, 0] > 0) if masked else q)

    return model, guide, x


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "elbo", ["Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO"]
)
def test_pyro_losses_and_gradients(
    pyro: Any, elbo: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same samples: here both draw PyTorch's noise."""
    from fastvae.integrations.pyro import patch as patch_pyro

    model, guide, x = program(pyro, masked)
    loss = getattr(pyro.infer, elbo)()

    def step() -> tuple[float, dict[str, Tensor]]:
        pyro.set_rng_seed(1)
        value = loss.loss_and_grads(model, guide, x)
        parameters = dict(pyro.get_param_store().named_parameters())
        grads = {name: p.grad.clone() for name, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        return value, grads

    def same_noise(self: Normal, sample_shape: Any = ()) -> Any:
        return NotImplemented

    monkeypatch.setattr(integration, "normal_rsample", same_noise)
    step()
    want, want_grads = step()
    with patch_pyro() as patch:
        found, grads = step()
    assert found == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(grads, want_grads, rtol=1e-4, atol=1e-4)
    assert patch.served["Independent.log_prob"] >= 2
    assert bool(patch.served["kl_divergence(Independent, Independent)"]) == (
        elbo == "TraceMeanField_ELBO"
    )
    monkeypatch.undo()
    with patch_pyro() as patch:
        other, _ = step()
    assert patch.served["Normal.rsample"] == 1
    assert other != want  # of other noise


def test_pyro_elbo_is_the_same_on_average(pyro: Any) -> None:
    from fastvae.integrations.pyro import patch as patch_pyro

    model, guide, x = program(pyro)
    elbo = pyro.infer.TraceMeanField_ELBO()
    plain = torch.tensor([elbo.loss(model, guide, x) for _ in range(200)])
    with patch_pyro():
        patched = torch.tensor([elbo.loss(model, guide, x) for _ in range(200)])
    error = (plain.var() / 200 + patched.var() / 200).sqrt()
    assert (plain.mean() - patched.mean()).abs() < 4 * error
    assert (patched.std() / plain.std() - 1).abs() < 0.4


def test_pyro_jit_keeps_the_originals(pyro: Any) -> None:
    from fastvae.integrations.pyro import patch as patch_pyro

    model, guide, x = program(pyro)
    elbo = pyro.infer.JitTraceMeanField_ELBO(ignore_jit_warnings=True)
    with patch_pyro() as patch:
        loss = elbo.differentiable_loss(model, guide, x)
        loss.backward()
    assert patch.passed_on["Normal.rsample"]  # while it traced
    assert patch.passed_on["kl_divergence(Independent, Independent)"]


def test_kl_to_a_multivariate_normal_is_left_alone(pyro: Any) -> None:
    import pyro.distributions as dist

    from fastvae.integrations.pyro import patch as patch_pyro

    q = dist.Normal(torch.randn(D), 1.0).to_event(1)
    p = MultivariateNormal(torch.zeros(D), torch.eye(D))
    want = kl_divergence(q, p)
    with patch_pyro():
        torch.testing.assert_close(kl_divergence(q, p), want)


def test_pyro_score_gradients_are_as_exact(pyro: Any) -> None:
    """Gradients of the score, of samples that are not differentiated: without bias, and with the
    variance that PyTorch's noise gives them, which the product of all terms is sensitive to."""
    import pyro.distributions as dist
    from pyro.distributions.testing import fakes

    from fastvae.integrations.pyro import patch as patch_pyro

    x, normal, particles = torch.tensor([-0.5, 2.0]), fakes.NonreparameterizedNormal, 1000

    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        scale = pyro.param("scale", lambda: torch.ones(()))
        with pyro.plate("data", 2):
            pyro.sample("z", normal(torch.zeros(2), scale))

    elbo = pyro.infer.Trace_ELBO(
        num_particles=particles, vectorize_particles=True, max_plate_nesting=1
    )

    def gradient() -> Tensor:
        elbo.loss_and_grads(model, guide)
        scale = pyro.param("scale").unconstrained()
        found, scale.grad = scale.grad.clone(), None
        return found

    with patch_pyro() as patch:
        patched = torch.stack([gradient() for _ in range(300)])
    assert patch.served["Normal.sample"] or patch.served["Normal.rsample"]
    # One particle's: -sum (z^2 - 1) ln N(x; z, 1), ln N = -1/2 (x - z)^2 - 1/2 ln 2 pi.
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1_000_000, 2, generator=generator, dtype=torch.float64)
    of_one = (0.5 * (z**2 - 1) * ((x - z) ** 2 + torch.tensor(2 * torch.pi).log())).sum(1)
    spread = of_one.std() / particles**0.5
    assert abs(patched.mean() - 2) < 4 * spread / 300**0.5
    assert abs(patched.std() / spread - 1) < 0.17  # four standard errors
