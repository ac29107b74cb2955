"""Every likelihood: its log-probability, mean and samples agree with each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal

import fastvae
from fastvae import Bound, Likelihood

B, SHAPE = 3, (2, 3, 2)
LIKELIHOODS: dict[str, Likelihood] = {
    "gaussian": fastvae.Gaussian(0.3),
    "learned": fastvae.LearnedGaussian(sigma=0.5),
    "channel": fastvae.LearnedGaussian((2, 1, 1), sigma=0.5),
    "pixel": fastvae.LearnedGaussian(SHAPE, sigma=0.5),
    "heteroscedastic": fastvae.HeteroscedasticGaussian(Bound(-2, 2, "soft")),
    "optimal": fastvae.OptimalGaussian(),
    "laplace": fastvae.Laplace(0.3, learned=True),
    "bernoulli": fastvae.Bernoulli(),
    "continuous_bernoulli": fastvae.ContinuousBernoulli(),
    "discretized_logistic": fastvae.DiscretizedLogistic(17),
    "mixture": fastvae.DiscretizedLogisticMixture(3, 17),
    "categorical": fastvae.Categorical(5),
    "poisson": fastvae.Poisson(),
    "nb": fastvae.NegativeBinomial(SHAPE, theta=2.0),
    "nb of cells": fastvae.NegativeBinomial(dispersion="cell"),
    "zinb": fastvae.ZeroInflatedNegativeBinomial(SHAPE, theta=2.0),
}
each_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
DISCRETE = {"bernoulli": 2, "discretized_logistic": 17, "mixture": 17, "categorical": 5}
COUNTS = ("poisson", "nb", "nb of cells", "zinb")


def make(name: str, device: torch.device) -> tuple[Likelihood, Tensor]:
    """A likelihood in float64 and a decoder's output for it."""
    likelihood = LIKELIHOODS[name].double().to(device).train()
    torch.manual_seed(1)
    decoded = torch.randn(B, likelihood.outputs * SHAPE[0], *SHAPE[1:], dtype=torch.float64)
    return likelihood, decoded.to(device)


@each_likelihood
def test_shapes_and_leading_samples(name: str, device: torch.device) -> None:
    likelihood, decoded = make(name, device)
    likelihood.eval()
    x = likelihood.sample(decoded, seed=0)
    assert x.shape == likelihood.mean(decoded).shape == (B, *SHAPE)
    assert x.dtype == decoded.dtype
    log_prob = likelihood.log_prob(x, decoded)
    assert log_prob.shape == (B,)
    twice = likelihood.log_prob(x, torch.stack([decoded, decoded + 0.1]))
    torch.testing.assert_close(twice[0], log_prob)
    torch.testing.assert_close(twice[1], likelihood.log_prob(x, decoded + 0.1))
    assert torch.equal(likelihood.sample(decoded, seed=0), x)
    assert not torch.equal(likelihood.sample(decoded, seed=1), x)
    for i in range(B):  # examples are independent
        torch.testing.assert_close(
            likelihood.log_prob(x[i : i + 1], decoded[i : i + 1])[0], log_prob[i]
        )
    with pytest.raises(ValueError, match=r"decoder returned shape \[3, 1, 3, 2\]; want that of x"):
        likelihood.log_prob(x, decoded[:, :1])


@each_likelihood
def test_gradients(name: str, device: torch.device) -> None:
    likelihood, decoded = make(name, device)
    x = likelihood.sample(decoded, seed=0)
    likelihood.train()
    if name == "optimal":
        likelihood.through_sigma = True
    own = [p for p in likelihood.parameters() if p.requires_grad]
    assert bool(own) == (name in ("learned", "channel", "pixel", "laplace", "nb", "zinb"))

    def loss(decoded: Tensor, *_: Tensor) -> Tensor:
        return likelihood.log_prob(x, decoded)

    assert gradcheck(loss, (decoded.requires_grad_(), *own))
    if name == "optimal":
        likelihood.through_sigma = False


@each_likelihood
def test_samples_have_the_mean_and_the_density(name: str, device: torch.device) -> None:
    """One pixel, many samples: the mean is `mean`; E ln p of them is minus the entropy, which is
    known from the density itself, on a grid."""
    likelihood, decoded = make(name, device)
    likelihood.eval()
    n, decoded = 20_000, decoded[:1, :, :1, :1]
    if name in ("channel", "pixel"):
        likelihood = fastvae.LearnedGaussian(sigma=0.5).double().to(device)
    if name in ("nb", "zinb"):
        likelihood = type(likelihood)((1, 1, 1), theta=2.0).double().to(device)
    if name == "discretized_logistic":  # well inside the levels, so that its location is its mean
        decoded = torch.tensor([0.4, 0.6, -3.0, -3.0]).double().reshape(1, 4, 1, 1).to(device)
    if name == "mixture":
        decoded = decoded.sigmoid()
        decoded[:, 12:] -= 4.0
    many = decoded.expand(n, *decoded.shape[1:])
    x = likelihood.sample(many, seed=3)
    spread = x.std(0)
    error = (x.mean(0) - likelihood.mean(decoded)[0]).abs() / (spread / math.sqrt(n) + 1e-12)
    assert (error < 5).all()
    wrong = (x.mean(0) - likelihood.mean(decoded)[0] - 0.2 * spread).abs()
    assert (wrong > 5 * spread / math.sqrt(n)).all()

    if name in DISCRETE:
        grid = torch.linspace(0, 1, DISCRETE[name], dtype=torch.float64, device=device)
        assert (x.unsqueeze(-1) == grid).any(-1).all()
        weight = torch.ones_like(grid)
    elif name == "continuous_bernoulli":
        grid = torch.linspace(0, 1, 2001, dtype=torch.float64, device=device)
        weight = torch.full_like(grid, 1 / 2000)
        weight[[0, -1]] /= 2
        assert ((x >= 0) & (x <= 1)).all()
    elif name in COUNTS:
        grid = torch.arange(3000, dtype=torch.float64, device=device)
        weight = torch.ones_like(grid)
        assert torch.equal(x, x.floor())
    else:
        grid = torch.linspace(-15, 15, 30_001, dtype=torch.float64, device=device)
        weight = torch.full_like(grid, 1e-3)
    # The two pixels at the same value, so that the sum over the event is over both.
    one, k = decoded[:, ::2], len(grid)
    on_grid = likelihood.log_prob(grid.reshape(k, 1, 1, 1), one.expand(k, *one.shape[1:]))
    probability = on_grid.exp() * weight
    assert probability.sum().item() == pytest.approx(1, abs=1e-3)
    entropy = -(probability * on_grid.clamp(min=-1e6)).sum()
    of_samples = likelihood.log_prob(x[:, :1], one.expand(n, *one.shape[1:]))
    assert (of_samples.mean() + entropy).abs() < 5 * of_samples.std() / math.sqrt(n) + 1e-3


def test_where_sigma_comes_from(device: torch.device) -> None:
    torch.manual_seed(0)
    x, mean = torch.rand(2, B, *SHAPE, dtype=torch.float64, device=device)

    def expected(sigma: Tensor | float) -> Tensor:
        return Independent(Normal(mean, sigma), 3).log_prob(x)

    torch.testing.assert_close(fastvae.Gaussian(0.3).log_prob(x, mean), expected(0.3))
    for shape in ((), (2, 1, 1), SHAPE):
        likelihood = fastvae.LearnedGaussian(shape).double().to(device)
        torch.nn.init.normal_(likelihood.logvar)
        sigma = (likelihood.logvar / 2).exp()
        torch.testing.assert_close(likelihood.log_prob(x, mean), expected(sigma))
    logvar = torch.randn_like(mean)
    for bound in (None, Bound(-0.5, 0.5)):
        decoded = torch.cat([mean, logvar], 1)
        sigma = ((logvar if bound is None else logvar.clamp(-0.5, 0.5)) / 2).exp()
        likelihood = fastvae.HeteroscedasticGaussian(bound)
        torch.testing.assert_close(likelihood.log_prob(x, decoded), expected(sigma))


def test_optimal_sigma(device: torch.device) -> None:
    torch.manual_seed(0)
    x, mean = torch.rand(2, 50, *SHAPE, dtype=torch.float64, device=device)
    mean.requires_grad_()
    likelihood = fastvae.OptimalGaussian().to(device)
    mse = (x - mean).square().mean()
    nll = -likelihood.log_prob(x, mean).sum()
    torch.testing.assert_close(nll, x.numel() / 2 * torch.log(2 * math.pi * math.e * mse))
    for factor in (0.9, 1.1):  # no other sigma does better
        other = fastvae.Gaussian(factor * mse.sqrt().item())
        assert -other.log_prob(x, mean).sum() > nll

    # Through sigma or not: the same for the batch's mean, not for one example's.
    through = fastvae.OptimalGaussian(through_sigma=True).to(device)
    (plain,) = torch.autograd.grad(likelihood.log_prob(x, mean).mean(), mean)
    (full,) = torch.autograd.grad(through.log_prob(x, mean).mean(), mean)
    torch.testing.assert_close(full, plain)
    (plain,) = torch.autograd.grad(likelihood.log_prob(x, mean)[0], mean)
    (full,) = torch.autograd.grad(through.log_prob(x, mean)[0], mean)
    assert not plain[1:].any()
    assert full[1:].all()  # the others decide about sigma

    # In evaluation, the average over batches: an example does not depend on others.
    likelihood = fastvae.OptimalGaussian(momentum=0.5).to(device)
    for scale in (1.0, 2.0, 4.0):
        likelihood.log_prob(scale * x, scale * mean)
    average = mse * ((1 + 4) / 2 + 16) / 2
    torch.testing.assert_close(likelihood.mse.double(), average.detach(), rtol=1e-5, atol=0)
    likelihood.eval()
    together = likelihood.log_prob(x, mean)
    torch.testing.assert_close(likelihood.log_prob(x[:1], mean[:1])[0], together[0])
    torch.testing.assert_close(together, Independent(Normal(mean, average.sqrt()), 3).log_prob(x))


def test_categorical_takes_classes_or_levels(device: torch.device) -> None:
    index = torch.randint(5, (B, 6), device=device)
    decoded = torch.randn(B, 30, device=device)
    likelihood = fastvae.Categorical(5, -1.0, 1.0)
    want = likelihood.log_prob(index, decoded)
    levels = torch.linspace(-1, 1, 5, device=device)
    torch.testing.assert_close(likelihood.log_prob(levels[index], decoded), want)
    logits = decoded.reshape(B, 5, 6).movedim(1, -1)
    torch.testing.assert_close(
        want, Independent(torch.distributions.Categorical(logits=logits), 1).log_prob(index)
    )


@pytest.mark.parametrize("kind", ["hard", "soft", "straight_through"])
def test_bounds(kind: str) -> None:
    low, high = -3.0, 2.0
    x = torch.tensor([-1e4, -5.0, -3.0, -0.4, 2.0, 7.0, 1e4], dtype=torch.float64)
    x.requires_grad_()
    y = Bound(low, high, kind)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    excess = math.log1p(math.exp(low - high)) if kind == "soft" else 0
    assert (y >= low).all()
    assert (y <= high + excess + 1e-12).all()
    inside = (x > low) & (x < high)
    if kind == "soft":
        middle = torch.linspace(-2, 1, 5, dtype=torch.float64, requires_grad=True)
        assert gradcheck(Bound(low, high, kind), middle)
        assert (y.diff() >= 0).all()
        wide = Bound(-100, 100, kind)(middle)
        torch.testing.assert_close(wide, middle)
        assert (grad[1:-1] > 0).all()
        assert Bound(low, math.inf, kind)(x)[-1] == 1e4
    else:
        assert torch.equal(y, x.clamp(low, high))
        assert torch.equal(grad[inside], torch.ones_like(grad[inside]))
        outside = (x < low) | (x > high)
        assert (grad[outside] == (kind == "straight_through")).all()


def test_one_bad_batch_does_not_poison_the_average() -> None:
    likelihood = fastvae.OptimalGaussian(momentum=0.5)
    x, mean = torch.ones(4, 2), torch.zeros(4, 2, requires_grad=True)
    likelihood.log_prob(2 * x, mean)
    likelihood.log_prob(torch.full_like(x, math.nan), mean)
    likelihood.log_prob(torch.full_like(x, math.inf), mean)
    assert likelihood.mse.item() == 4
    with torch.no_grad():  # nor does evaluation in training mode move it
        likelihood.log_prob(9 * x, mean)
    assert likelihood.mse.item() == 4
    likelihood.log_prob(4 * x, mean)
    assert likelihood.mse.item() == (4 + 16) / 2


def test_optimal_sigma_of_half_types() -> None:
    for value in (300.0, 1e-4):
        x = torch.full((1, 50), value, dtype=torch.float16)
        mean = torch.zeros_like(x, requires_grad=True)
        got = fastvae.OptimalGaussian().log_prob(x, mean)
        want = fastvae.OptimalGaussian().log_prob(x.double(), mean.detach().double())
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("likelihood", "good", "bad", "said"),
    [
        (fastvae.Gaussian(), -3.5, math.nan, "x has nan in example 1; want finite numbers for"),
        (
            fastvae.Bernoulli(),
            0.3,
            1.5,
            "x has 1.5 in example 1; want numbers from 0 to 1 for Bern",
        ),
        (fastvae.ContinuousBernoulli(), 1.0, -0.1, "want numbers from 0 to 1 for Continuous"),
        (
            fastvae.DiscretizedLogistic(4, -1, 2),
            2.0,
            2.1,
            "want numbers from -1 to 2 for Discretiz",
        ),
        (
            fastvae.Poisson(),
            7.0,
            0.5,
            "x has 0.5 in example 1; want whole numbers of 0 or more for",
        ),
        (fastvae.NegativeBinomial(2), 0.0, -1.0, "want whole numbers of 0 or more for Negative"),
        (fastvae.Categorical(3), 0.5, 7.0, "want numbers from 0 to 1 for Categorical"),
    ],
)
def test_data_outside_the_support(
    likelihood: Likelihood, good: float, bad: float, said: str
) -> None:
    x = torch.full((3, 2), good)
    likelihood.check(x)
    x[1, 1] = bad
    with pytest.raises(ValueError, match=said):
        likelihood.check(x)


def test_the_first_example_outside_the_support_is_named() -> None:
    """However many there are."""
    x = torch.zeros(10_000, 2)
    x[[4999, 9000], 1] = 2
    with pytest.raises(ValueError, match="x has 2 in example 4999"):
        fastvae.Bernoulli().check(x)


def test_classes_outside_the_support() -> None:
    fastvae.Categorical(3).check(torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="x has classes 0 to 3; want 0 to 2"):
        fastvae.Categorical(3).check(torch.tensor([[0, 3]]))


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"sigma is 0.0; want a number above 0"):
        fastvae.Gaussian(0.0)
    with pytest.raises(ValueError, match=r"sigma is inf; want a number above 0"):
        fastvae.LearnedGaussian(sigma=math.inf)
    with pytest.raises(ValueError, match=r"scale is -1; want a number above 0"):
        fastvae.Laplace(-1)
    with pytest.raises(ValueError, match=r"bins is 1; want at least 2"):
        fastvae.Categorical(1)
    with pytest.raises(ValueError, match=r"low is 1 and high is 0; want low below high"):
        fastvae.DiscretizedLogistic(low=1, high=0)
    with pytest.raises(ValueError, match=r"components is 0; want at least 1"):
        fastvae.DiscretizedLogisticMixture(0)
    with pytest.raises(ValueError, match=r"low is 2 and high is 1; want low below high"):
        Bound(2, 1)
    with pytest.raises(ValueError, match=r"kind is 'firm'; want one of 'hard', 'soft'"):
        Bound(kind="firm")
