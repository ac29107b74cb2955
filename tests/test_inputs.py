"""Bad calls are one clear error each, the same from every backend, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

import fastvae
from fastvae import reference

M, L = torch.zeros(4, 6), torch.zeros(4, 6)
SEEDS = torch.arange(4)
Call = Callable[[ModuleType], object]

# For each wrong thing: the calls that it is wrong in, the error, and what that says.
BAD_CALLS: dict[str, tuple[list[Call], type[Exception], str]] = {
    "shapes that do not broadcast": (
        [
            lambda f: f.rsample(M, L[:3]),
            lambda f: f.kl_divergence(M, L[:3]),
            lambda f: f.rsample_kl(M, L[:3]),
            lambda f: f.rsample_log_ratio(M, L[:3]),
        ],
        ValueError,
        r"^shapes do not broadcast: mu \[4, 6\], logvar \[3, 6\]$",
    ),
    "prior of another shape": (
        [lambda f: f.kl_divergence(M, L, M, L[:, :5]), lambda f: f.rsample_kl(M, L, M, L[:, :5])],
        ValueError,
        r"^shapes do not broadcast: .*prior_logvar \[4, 5\]$",
    ),
    "mean of another shape": (
        [lambda f: f.gaussian_log_prob(M, L[:, :5]), lambda f: f.gaussian_log_prob(M, L[:, :5], M)],
        ValueError,
        r"^shapes do not broadcast: x \[4, 6\], mean \[4, 5\]",
    ),
    "logits of another shape": (
        [
            lambda f: f.bernoulli_log_prob(M, L[:, :5]),
            lambda f: f.continuous_bernoulli_log_prob(M, L[:, :5]),
        ],
        ValueError,
        r"^shapes do not broadcast: x \[4, 6\], logits \[4, 5\]",
    ),
    "scales of another shape": (
        [
            lambda f: f.laplace_log_prob(M, M, L[:, :5]),
            lambda f: f.discretized_logistic_log_prob(M, M, L[:, :5]),
        ],
        ValueError,
        r"^shapes do not broadcast: x \[4, 6\], mean \[4, 6\], log_scale \[4, 5\]",
    ),
    "no scale": (
        [
            lambda f: f.laplace_log_prob(M, M, None),
            lambda f: f.discretized_logistic_log_prob(M, M, None),
        ],
        TypeError,
        r"^log_scale is a NoneType; want a tensor or a number$",
    ),
    "one level": (
        [lambda f: f.discretized_logistic_log_prob(M, M, bins=1)],
        ValueError,
        r"^bins is 1; want at least 2$",
    ),
    "levels that are one": (
        [lambda f: f.discretized_logistic_log_prob(M, M, low=1.0)],
        ValueError,
        r"^low is 1.0 and high is 1.0; want low below high$",
    ),
    "logits on another device": (
        [lambda f: f.bernoulli_log_prob(M, L.to("meta"))],
        ValueError,
        r"^logits is on meta, x on cpu; want one device$",
    ),
    "complex tensors": (
        [lambda f: f.rsample(M.cfloat(), L)],
        TypeError,
        r"^mu has dtype torch.complex64; want one of float32, .*, or integers as data$",
    ),
    "mixed devices": (
        [
            lambda f: f.rsample(M, L.to("meta")),
            lambda f: f.kl_divergence(M, L.to("meta")),
            lambda f: f.rsample_kl(M, L.to("meta")),
            lambda f: f.gaussian_log_prob(L, M, L.to("meta")),
        ],
        ValueError,
        r"^logvar is on meta, (mu|x) on cpu; want one device$",
    ),
    "no tensor or number": (
        [
            lambda f: f.rsample(M, "0"),
            lambda f: f.kl_divergence(M, "0"),
            lambda f: f.rsample_kl(M, "0"),
            lambda f: f.gaussian_log_prob(M, L, "0"),
        ],
        TypeError,
        r"^logvar is a str; want a tensor or a number$",
    ),
    "a list": (
        [lambda f: f.rsample([0.0, 1.0], L)],
        TypeError,
        r"^mu is a list; want a tensor or a number$",
    ),
    "None": (
        [
            lambda f: f.rsample(M, None),
            lambda f: f.rsample_kl(M, None),
            lambda f: f.kl_divergence(M, None),
            lambda f: f.gaussian_log_prob(M, M, None),
        ],
        TypeError,
        r"^logvar is a NoneType; want a tensor or a number$",
    ),
    "half a prior": (
        [lambda f: f.kl_divergence(M, L, M), lambda f: f.rsample_log_ratio(M, L, prior_mu=M)],
        ValueError,
        r"^prior_logvar is None; want both prior_mu and prior_logvar, or neither$",
    ),
    "the other half": (
        [
            lambda f: f.kl_divergence(M, L, prior_logvar=L),
            lambda f: f.rsample_kl(M, L, prior_logvar=0.0),
        ],
        ValueError,
        r"^prior_mu is None; want both",
    ),
    "an unknown param": (
        [
            lambda f: f.rsample(M, L, param="sigma"),
            lambda f: f.kl_divergence(M, L, param="sigma"),
            lambda f: f.rsample_kl(M, L, param="sigma"),
            lambda f: f.gaussian_log_prob(M, L, param="sigma"),
        ],
        ValueError,
        r"^param is 'sigma'; want one of 'logvar', 'log_std', 'std', 'var', 'softplus'$",
    ),
    "a bound of no log-variance": (
        [
            lambda f: f.rsample(M, L, param="std", bound=fastvae.Bound()),
            lambda f: f.kl_divergence(M, L, param="std", bound=fastvae.Bound()),
            lambda f: f.rsample_kl(M, L, param="std", bound=fastvae.Bound()),
            lambda f: f.gaussian_log_prob(M, L, 1.0, param="std", bound=fastvae.Bound()),
            lambda f: f.gaussian_nll_loss(M, L, 1.0, param="std", bound=fastvae.Bound()),
            lambda f: fastvae.DiagonalGaussian(M, L, param="std", bound=fastvae.Bound()),
        ],
        ValueError,
        r"^bound is given and param is 'std'; want param='logvar' with it$",
    ),
    "a bound of another type": (
        [lambda f: f.rsample(M, L, bound=(-30, 20)), lambda f: f.rsample_kl(M, L, bound=20.0)],
        TypeError,
        r"^bound is a (tuple|float); want a fastvae.Bound or None$",
    ),
    "a param of another type": (
        [lambda f: f.rsample(M, L, param=0), lambda f: f.kl_divergence(M, L, param=["std"])],
        ValueError,
        r"^param is .*; want one of 'logvar'",
    ),
    "event_ndim out of range": (
        [
            lambda f: f.kl_divergence(M, L, event_ndim=3),
            lambda f: f.rsample_kl(M, L, event_ndim=3),
            lambda f: f.rsample_log_ratio(M, L, event_ndim=3, sample_shape=(2,)),
            lambda f: f.gaussian_log_prob(M, L, event_ndim=3),
            lambda f: f.bernoulli_log_prob(M, L, event_ndim=3),
            lambda f: f.continuous_bernoulli_log_prob(M, L, event_ndim=3),
            lambda f: f.laplace_log_prob(M, L, event_ndim=3),
            lambda f: f.discretized_logistic_log_prob(M, L, event_ndim=3),
        ],
        ValueError,
        r"^event_ndim is 3; want 0 to 2 for 2 dimensions$",
    ),
    "a negative event_ndim": (
        [lambda f: f.kl_divergence(M, L, event_ndim=-1)],
        ValueError,
        r"^event_ndim is -1; want 0 to 2",
    ),
    "event_ndim of no dimensions": (
        [lambda f: f.kl_divergence(0.0, 1.0, event_ndim=1)],
        ValueError,
        r"^event_ndim is 1; want 0 to 0",
    ),
    "an event_ndim that is no int": (
        [
            lambda f: f.kl_divergence(M, L, event_ndim=1.0),
            lambda f: f.gaussian_log_prob(M, L, event_ndim=True),
        ],
        TypeError,
        r"^event_ndim is (1.0|True); want an int or None$",
    ),
    "a seed of another dtype": (
        [
            lambda f: f.rsample(M, L, seed=torch.tensor(1.0)),
            lambda f: f.rsample_kl(M, L, seed=torch.tensor(1.0)),
        ],
        TypeError,
        r"^seed has dtype torch.float32; want torch.int64$",
    ),
    "seeds of another number of rows": (
        [
            lambda f: f.rsample(M, L, seed=SEEDS[:3]),
            lambda f: f.rsample_kl(M, L, seed=SEEDS[:3]),
            lambda f: f.rsample_log_ratio(M, L, seed=SEEDS[:3], sample_shape=(3,)),
            lambda f: f.rsample(M, L, seed=SEEDS[:3], sample_shape=(3,)),
        ],
        ValueError,
        r"^seed has shape \[3\]; want \[\], or \[4\]: one for each row$",
    ),
    "a seed of one row": (
        [lambda f: f.rsample(M, L, seed=SEEDS[:1])],
        ValueError,
        r"^seed has shape \[1\]; want \[\], or \[4\]",
    ),
    "a seed of two dimensions": (
        [lambda f: f.rsample(M, L, seed=SEEDS[:, None])],
        ValueError,
        r"^seed has shape \[4, 1\]; want \[\], or \[4\]",
    ),
    "seeds without rows": (
        [lambda f: f.rsample(0.0, 0.0, seed=SEEDS)],
        ValueError,
        r"^seed has shape \[4\]; want \[\]$",
    ),
    "a seed on another device": (
        [
            lambda f: f.rsample(M, L, seed=SEEDS.to("meta")),
            lambda f: f.rsample_kl(M, L, seed=SEEDS.to("meta")),
        ],
        ValueError,
        r"^seed is on meta; want cpu, where the input is$",
    ),
    "a seed that is no int": (
        [lambda f: f.rsample(M, L, seed=1.5), lambda f: f.rsample(M, L, seed=True)],
        TypeError,
        r"^seed is (1.5|True); want an int, an int64 tensor or None$",
    ),
    "a seed too large": (
        [lambda f: f.rsample(M, L, seed=2**63), lambda f: f.rsample(M, L, seed=-(2**63) - 1)],
        ValueError,
        r"^seed is -?\d+; want a signed 64-bit integer$",
    ),
    "seed and generator": (
        [
            lambda f: f.rsample(M, L, seed=1, generator=torch.Generator()),
            lambda f: f.rsample_kl(M, L, seed=SEEDS, generator=torch.Generator()),
        ],
        ValueError,
        r"^seed and generator are both given; want one of them$",
    ),
    "a negative sample shape": (
        [
            lambda f: f.rsample(M, L, sample_shape=(2, -1)),
            lambda f: f.rsample_log_ratio(M, L, sample_shape=(2, -1)),
        ],
        ValueError,
        r"^sample_shape is \[2, -1\]; want no negative size$",
    ),
    "a sample shape that is none": (
        [
            lambda f: f.rsample(M, L, sample_shape=3),
            lambda f: f.rsample(M, L, sample_shape=(1.5,)),
            lambda f: f.rsample(M, L, sample_shape="ab"),
        ],
        TypeError,
        r"^sample_shape is .*; want a sequence of ints$",
    ),
}


@pytest.mark.parametrize(("calls", "kind", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.parametrize("module", [fastvae, reference], ids=["native", "reference"])
def test_bad_calls(
    calls: list[Call], kind: type[Exception], message: str, module: ModuleType
) -> None:
    for call in calls:
        with pytest.raises(kind, match=message):
            call(module)


def test_mixed_devices_name_the_device(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("meta stands for another device in test_bad_calls")
    for module in (fastvae, reference):
        with pytest.raises(ValueError, match=r"^logvar is on cpu, mu on cuda:0; want one device$"):
            module.rsample(M.to(device), L)
        with pytest.raises(ValueError, match=r"^seed is on cpu; want cuda:0"):
            module.rsample(M.to(device), L.to(device), seed=SEEDS)


OTHER_LAYOUTS = {
    "sparse": (lambda t: t.to_sparse(), "layout torch.sparse_coo"),
    "compressed": (lambda t: t.to_sparse_csr(), "layout torch.sparse_csr"),
    "mkldnn": (lambda t: t.to_mkldnn(), "layout torch._mkldnn"),
    "nested": (lambda t: torch.nested.nested_tensor([*t]), r"tensors \(nested\)"),
}


@pytest.mark.parametrize(("layout", "name"), OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
@pytest.mark.parametrize("module", [fastvae, reference], ids=["fused", "reference"])
@pytest.mark.filterwarnings("ignore:Sparse CSR|.*nested tensors")
def test_other_layouts_are_named(layout, name: str, module) -> None:
    x = torch.randn(4, 6)
    odd = layout(x)
    for argument, call in (
        ("mu", lambda: module.kl_divergence(odd, odd)),
        ("logvar", lambda: module.kl_divergence(x, odd)),
        ("mu", lambda: module.rsample(odd, 0.0)),
        ("mean", lambda: module.gaussian_nll_loss(x, odd)),
        ("x", lambda: module.bernoulli_log_prob(odd, x)),
        ("weight", lambda: module.kl_divergence(x, x, weight=odd)),
    ):
        with pytest.raises(TypeError, match=f"{argument} is a tensor of {name}; want a dense one"):
            call()
