"""Patches of other packages: what they serve is right, and undoing them leaves no trace."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl, kl_divergence

from fastvae.integrations.patching import Patch


class Greeter:
    def greet(self, name: str) -> str:
        return f"hello {name}"


class Child(Greeter):
    pass


def test_a_patch_serves_passes_on_and_is_undone() -> None:
    def shout(self: Greeter, name: str) -> Any:
        return NotImplemented if name == "nobody" else f"HELLO {name}"

    early = Greeter.greet
    with Patch() as patch:
        patch.replace(Greeter, "greet", shout)
        patch.replace(Child, "greet", shout)
        assert Greeter().greet("you") == "HELLO you"
        assert Greeter().greet("nobody") == "hello nobody"
        assert Child().greet("all") == "HELLO all"
        assert patch.served == {"Greeter.greet": 1, "Child.greet": 1}
        assert patch.passed_on == {"Greeter.greet": 1}
        assert "Greeter.greet" in str(patch)
    assert Greeter.greet is early
    assert "greet" not in vars(Child)
    patch.undo()  # once more


# ---- scvi-tools ----------------------------------------------------------------------------------


@pytest.fixture
def scvi() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("scvi")
        package.settings.verbosity = logging.ERROR
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        yield package


def distributions(scvi: Any, dtype: torch.dtype = torch.float32) -> list[tuple[Any, list[Any]]]:
    """Each of scvi-tools', and the tensors that it was made of."""
    generator = torch.Generator().manual_seed(0)

    def positive(*shape: int) -> torch.Tensor:
        t = torch.rand(shape, generator=generator, dtype=torch.float64).add(0.05)
        return t.to(dtype).requires_grad_()

    mu, other, theta, logits = positive(6, 9), positive(6, 9), positive(9), positive(6, 9)
    d = scvi.distributions
    return [
        (d.NegativeBinomial(mu=4 * mu, theta=theta), [mu, theta]),
        (d.NegativeBinomial(mu=4 * mu, theta=other), [mu, other]),
        (d.NegativeBinomial(total_count=theta, logits=logits), [theta, logits]),
        (
            d.ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=logits),
            [mu, theta, logits],
        ),
        (d.Poisson(rate=mu), [mu]),
        (
            d.NegativeBinomialMixture(mu1=mu, mu2=4 * other, theta1=theta, mixture_logits=logits),
            [mu, other, theta, logits],
        ),
    ]


def test_scvi_distributions(scvi: Any) -> None:
    from fastvae.integrations import scvi as integration

    x = torch.poisson(torch.full((6, 9), 1.5), torch.Generator().manual_seed(1))
    for index in range(len(distributions(scvi))):
        right, leaves = distributions(scvi, torch.float64)[index]
        want = right.log_prob(x.double())
        want_grads = torch.autograd.grad(want.sum(), leaves)
        with integration.patch() as patch:
            ours, leaves = distributions(scvi)[index]
            got = ours.log_prob(x)
            grads = torch.autograd.grad(got.sum(), leaves)
        assert sum(patch.served.values()) == 1
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        for grad, right_grad in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(grad.double(), right_grad, rtol=1e-4, atol=1e-4)


def test_scvi_patch_is_exact_where_scvi_is_not(scvi: Any) -> None:
    """theta = 10^8, where users report nonsensical likelihoods."""
    from fastvae.integrations import scvi as integration

    x, mean = torch.tensor([3.0]), torch.tensor([2.0])
    nb = scvi.distributions.NegativeBinomial(mu=mean, theta=torch.tensor([1e8]))
    want = torch.distributions.Poisson(mean).log_prob(x)
    assert (nb.log_prob(x) - want).abs() > 1e-2
    with integration.patch():
        assert (nb.log_prob(x) - want).abs() < 1e-5


def test_normals_under_the_scvi_patch(scvi: Any) -> None:
    from fastvae.integrations import scvi as integration

    loc = torch.randn(5, 3, requires_grad=True)
    q, p = Normal(loc, torch.rand(5, 3) + 0.1), Normal(torch.zeros(5, 3), torch.ones(5, 3))
    want = kl_divergence(q, p)
    before = kl._KL_REGISTRY[Normal, Normal]
    with integration.patch() as patch:
        torch.testing.assert_close(kl_divergence(q, p), want)
        torch.manual_seed(0)
        z = q.rsample((4,))
        torch.manual_seed(0)
        assert torch.equal(q.rsample((4,)), z)
        assert z.shape == (4, 5, 3)
        assert torch.autograd.grad(z.sum(), loc)[0].eq(4).all()
        many = Normal(torch.zeros(()), torch.ones(())).expand((20_000,)).rsample()
        assert abs(many.std().item() - 1) < 0.03  # not one number, expanded
        kl_divergence(Normal(0.0, 1.0), torch.distributions.Laplace(0.0, 1.0))
    assert patch.served["Normal.rsample"] == 3
    assert kl._KL_REGISTRY[Normal, Normal] is before
    torch.testing.assert_close(kl_divergence(q, p), want)


def test_scvi_warns_outside_the_support_as_before(scvi: Any) -> None:
    from fastvae.integrations import scvi as integration

    distribution, _ = distributions(scvi)[3]
    with integration.patch(), pytest.warns(UserWarning, match="within the support"):
        distribution.log_prob(torch.full((6, 9), -1.0))


def counts(cells: int, genes: int) -> Any:
    anndata = pytest.importorskip("anndata")
    generator = np.random.default_rng(0)
    kind = generator.integers(3, size=cells)
    share = generator.dirichlet(np.full(genes, 0.5), size=3)[kind]
    rate = generator.gamma(2.0, 2 * genes * share / 2.0)
    data = anndata.AnnData(generator.poisson(rate).astype(np.float32))
    data.obs["batch"] = generator.integers(2, size=cells).astype(str)
    data.obs["labels"] = kind.astype(str)
    data.obsm["proteins"] = generator.poisson(5, size=(cells, 6)).astype(np.float32)
    return data


def train(scvi: Any, name: str, data: Any, seed: int, **options: Any) -> float:
    """The ELBO of a model trained for some epochs."""
    kind = getattr(scvi.model, name)
    setup: dict[str, Any] = {"batch_key": "batch"}
    if name == "SCANVI":
        setup |= {"labels_key": "labels", "unlabeled_category": "none"}
    if name == "TOTALVI":
        setup |= {"protein_expression_obsm_key": "proteins"}
    kind.setup_anndata(data, **setup)
    scvi.settings.seed = seed
    model = kind(data, **options)
    model.train(max_epochs=8, accelerator="cpu", enable_progress_bar=False, batch_size=64)
    return float(model.get_elbo())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SCVI", {"gene_likelihood": "zinb"}),
        ("SCVI", {"gene_likelihood": "nb", "dispersion": "gene-batch"}),
        ("SCVI", {"gene_likelihood": "poisson"}),
        ("LinearSCVI", {}),
        ("SCANVI", {}),
        ("TOTALVI", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_scvi_models_reach_the_same_elbo(scvi: Any, name: str, options: dict[str, Any]) -> None:
    from fastvae.integrations import scvi as integration

    data = counts(400, 60)
    seeds = range(3)
    plain = [train(scvi, name, data, seed, **options) for seed in seeds]
    with integration.patch() as patch:
        patched = [train(scvi, name, data, seed, **options) for seed in seeds]
    log_probs = [label for label in patch.served if label.endswith("log_prob")]
    assert log_probs
    assert patch.served["Normal.rsample"]
    spread = math.hypot(np.std(plain), np.std(patched))
    assert abs(np.mean(plain) - np.mean(patched)) < 3 * spread + 2e-3 * abs(np.mean(plain))
