"""`python -m fastvae verify`: identities with exact answers, computed on the user's machine.

Each check computes one quantity in two ways, one through the package and one in closed form, and
states the difference and what is allowed. All in float64 and under fixed seeds, so that a result
is the same in every run; where the package estimates from samples, the difference is in standard
errors, of which 5 are allowed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .backend import CHOICES, path, use_backend
from .models import likelihoods, objectives, penalties
from .models.cholesky import CholeskyGaussian
from .models.distributions import DiagonalGaussian
from .models.exact import ProbabilisticPCA
from .models.importance import log_mean_exp, log_weights, prior_sampling
from .models.vae import VAE

__all__ = ["CHECKS", "Check", "add_arguments", "checks", "main"]

EXACT = 1e-9  # nats: float64 sums of up to a thousand terms
STANDARD_ERRORS = 5.0


class Check(NamedTuple):
    """One identity and how well it holds."""

    group: str
    identity: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # and a NaN does not


Results = Iterator[tuple[str, float | Tensor, float]]


# ---- What the checks are about -------------------------------------------------------------------


def _normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return ops.rsample(torch.zeros(shape, dtype=torch.float64, device=device), 0.0, seed=seed)


def _ppca(device: torch.device) -> tuple[ProbabilisticPCA, Tensor]:
    """A fit, and its data: 200 examples of 8 correlated numbers, latents of 3."""
    x = _normal(device, 200, 8) @ _normal(device, 8, 8, seed=1) + 3.0
    return ProbabilisticPCA(x, 3), x


def _network(device: torch.device, **options: object) -> tuple[VAE, Tensor]:
    """A nonlinear model with fixed weights, and data."""
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2 * 4))
    decoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    model = VAE(encoder, decoder, latent_shape=4, **options).double().to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * _normal(device, p.numel(), seed=i).reshape(p.shape))
    return model, _normal(device, 10, 6, seed=100)


def _sigma_points(q: DiagonalGaussian) -> Tensor:
    """[2 k, B, k]: their average is the expectation under q of any quadratic function."""
    k = q.mu.shape[-1]
    offsets = math.sqrt(k) * torch.diag_embed(q.stddev).movedim(-2, 0)
    return torch.cat([q.mu + offsets, q.mu - offsets])


def _largest(t: Tensor) -> float:
    return t.detach().abs().max().item()


def _gradients(model: VAE, loss: Tensor, module: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


# ---- The checks ----------------------------------------------------------------------------------


def probabilistic_pca(device: torch.device) -> Results:
    ppca, x = _ppca(device)
    model = ppca.model()
    q = model.encode(x)
    assert isinstance(q, DiagonalGaussian)
    rate = q.kl().mean().item()
    decoded = model.decode(_sigma_points(q), sample_ndim=1)
    distortion = -model.likelihood.log_prob(x, decoded).mean().item()
    log_prob = ppca.log_prob(x)
    yield "rate = ½ Σ ln(λᵢ/σ²)", rate - ppca.rate, EXACT
    yield "distortion = (D/2) ln(2πeσ²)", distortion - ppca.distortion, EXACT
    yield "rate + distortion = −mean ln p(x)", rate + distortion + log_prob.mean().item(), EXACT
    estimate = model.log_likelihood(x, 2, seed=0)
    yield "every importance weight is p(x)", _largest(estimate.value - log_prob), EXACT
    yield (
        "so that their effective number is all",
        _largest(estimate.effective_sample_size - 2),
        EXACT,
    )


def importance_weighting(device: torch.device) -> Results:
    model, x = _network(device)
    iwae = objectives.IWAE(1)(model, x, seed=0).bound
    elbo = objectives.ELBO(kl="monte_carlo")(model, x, seed=0).bound
    yield "IWAE with K = 1 is the ELBO", _largest(iwae - elbo), EXACT

    log_w = log_weights(model, x, 60, seed=0).total
    bounds = [log_mean_exp(log_w.unflatten(0, (-1, k)), 1).mean(0) for k in (1, 5, 60)]
    fall = torch.stack(bounds).diff(dim=0).clamp(max=0)
    yield "the bound of the same samples rises with K: 1, 5, 60", _largest(fall), 0.0

    ppca, x = _ppca(device)
    exact = ppca.model()
    log_prob = ppca.log_prob(x)
    for k in (1, 7):
        bound = objectives.IWAE(k)(exact, x, seed=0).bound
        yield f"exact posterior: IWAE with K = {k} is ln p(x)", _largest(bound - log_prob), EXACT

    near = ppca.model()
    with torch.no_grad():
        for p in near.encoder.parameters():
            p.mul_(0.9)
    estimate = near.log_likelihood(x[:20], 20_000, chunk=1000, seed=0)
    error = (estimate.value - log_prob[:20]) / estimate.standard_error
    yield (
        "importance sampling of ln p(x), standard errors",
        _largest(error.mean() * math.sqrt(20)),
        STANDARD_ERRORS,
    )
    easy = ProbabilisticPCA(_normal(device, 50, 3, seed=2) * torch.tensor([1.2, 1, 0.9]).to(x), 1)
    point = easy.mean.unsqueeze(0)
    estimate = prior_sampling(easy.model(), point, 20_000, chunk=5000, seed=0)
    error = (estimate.value - easy.log_prob(point)) / estimate.standard_error
    yield "sampling the prior, an easy case, standard errors", error.item(), STANDARD_ERRORS


def gradient_estimators(device: torch.device) -> Results:
    ppca, x = _ppca(device)
    exact = ppca.model()
    for objective in (objectives.StickingTheLanding(1), objectives.DReG(7)):
        loss = objective(exact, x, seed=0).loss
        yield (
            f"exact posterior: no variance in gradients of {type(objective).__name__}",
            _largest(_gradients(exact, loss, exact.encoder)),
            EXACT,
        )

    model, x = _network(device)
    single = [
        _gradients(model, objective(model, x, seed=0).loss, model)
        for objective in (objectives.DReG(1), objectives.StickingTheLanding(1))
    ]
    yield "DReG with K = 1 is StickingTheLanding", _largest(single[0] - single[1]), EXACT

    dreg, iwae = (
        objective(model, x, seed=0).loss for objective in (objectives.DReG(7), objectives.IWAE(7))
    )
    decoders = [_gradients(model, loss, model.decoder) for loss in (dreg, iwae)]
    yield "the decoder's gradient of DReG is IWAE's", _largest(decoders[0] - decoders[1]), EXACT

    q = model.encode(x)
    z = q.rsample((7,), seed=0)
    log_w = (
        model.likelihood.log_prob(x, model.decode(z, sample_ndim=1))
        + model.prior.log_prob(z, event_ndim=1)
        - q.detach().log_prob(z)
    )
    v = torch.softmax(log_w, 0).detach()
    (by_z,) = torch.autograd.grad(log_w.sum(), z, retain_graph=True)
    paper = torch.autograd.grad(
        z, list(model.encoder.parameters()), -(v**2).unsqueeze(-1) * by_z / len(x)
    )
    got = _gradients(model, dreg, model.encoder)
    want = torch.cat([grad.flatten() for grad in paper])
    yield "the encoder's is Σ vₖ² (∂ln wₖ/∂zₖ)(∂zₖ/∂φ)", _largest(got - want), EXACT


def sigma_and_beta(device: torch.device) -> Results:
    x, mean = _normal(device, 20, 6), _normal(device, 20, 6, seed=1).requires_grad_()
    optimal, through = (likelihoods.OptimalGaussian(through_sigma=t).to(x) for t in (False, True))
    mse = (x - mean).square().mean()
    nll = -optimal.log_prob(x, mean).sum()
    closed = x.numel() / 2 * torch.log(2 * math.pi * math.e * mse)
    yield "optimal σ: NLL = (N/2) ln(2πe·MSE)", _largest(nll - closed), EXACT
    grads = [
        torch.autograd.grad(likelihood.log_prob(x, mean).sum(), mean)[0]
        for likelihood in (optimal, through)
    ]
    yield "no gradient passes through the optimal σ", _largest(grads[0] - grads[1]), EXACT

    # beta KL + SE / 2 = beta (KL + SE / (2 beta)), but for the normalizers of the Gaussians.
    beta = 2.5
    model, x = _network(device, objective=objectives.ELBO(penalties.Beta(beta)))
    weighted = model(x, seed=0).loss - 3 * math.log(2 * math.pi)
    model.objective = objectives.ELBO()
    model.likelihood = likelihoods.Gaussian(math.sqrt(beta))
    scaled = beta * (model(x, seed=0).loss - 3 * math.log(2 * math.pi * beta))
    yield "β with σ = 1 is β times σ² = β", _largest(weighted - scaled), EXACT

    kl = _normal(device, 20, 6).square()
    total = kl.sum(1).mean()
    yield "capacity 0 is β KL", _largest(penalties.Capacity(0.0, 1.0)(kl.sum(1)) - total), EXACT
    yield "free bits of 0 nats are the KL", _largest(penalties.FreeBits(0.0)(kl) - total), EXACT
    floor = kl.mean(0).clamp(min=1.0).sum()
    free = penalties.FreeBits(1.0)(kl)
    yield "free bits: Σ max(λ, mean KLⱼ)", _largest(free - floor), EXACT


def kl_divergences(device: torch.device) -> Results:
    n = 40_000
    mu, logvar = _normal(device, 1, 4), _normal(device, 1, 4, seed=1)
    q = DiagonalGaussian(mu.expand(n, 4), logvar.expand(n, 4))
    lower = 0.5 * _normal(device, 4, 4, seed=2).tril(-1) + torch.diag_embed(0.5 * logvar[0].exp())
    full = CholeskyGaussian(mu.expand(n, 4), lower)
    closed = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum()
    yield "KL of a diagonal Gaussian, closed form", _largest(q.kl() - closed), EXACT
    sigma = lower @ lower.T
    closed = 0.5 * (-torch.logdet(sigma) - 4 + sigma.trace() + mu.square().sum())
    yield "KL = ½(−ln det Σ − k + tr Σ + μᵀμ)", _largest(full.kl() - closed), EXACT
    prior_mu, prior_logvar = _normal(device, n, 4, seed=3), _normal(device, n, 4, seed=4)
    for name, p in (("N(0, I)", None), ("N(μₚ, σₚ²)", DiagonalGaussian(prior_mu, prior_logvar))):
        for kind, g in (("diagonal", q), ("full-covariance", full)):
            z, kl = g.rsample_kl(p, seed=5)
            standard = ops.gaussian_log_prob(z, 0.0, 0.0)
            difference = g.log_prob(z) - (standard if p is None else p.log_prob(z)) - kl
            error = difference.mean() / (difference.std() / math.sqrt(n))
            yield f"KL by samples, {kind} to {name}, standard errors", error, STANDARD_ERRORS


def gaussian_toy(device: torch.device) -> Results:
    """z ~ N(0, 1), x ~ N(z, s²), q = N(a, b²)."""
    s, a, b, x = 0.7, 0.4, 0.9, torch.tensor([[1.3]], dtype=torch.float64, device=device)
    q = DiagonalGaussian(torch.full_like(x, a), torch.full_like(x, b), param="std")
    likelihood = likelihoods.Gaussian(s)
    elbo = likelihood.log_prob(x, _sigma_points(q)).mean() - q.kl().item()
    log_prob = -0.5 * (x.item() ** 2 / (1 + s * s) + math.log(2 * math.pi * (1 + s * s)))
    variance = s * s / (1 + s * s)  # of p(z | x), whose mean is x / (1 + s^2)
    posterior = DiagonalGaussian(x / (1 + s * s), torch.full_like(x, variance), param="var")
    gap = 0.5 * (
        math.log(variance / b**2) + (b**2 + (a - x.item() / (1 + s * s)) ** 2) / variance - 1
    )
    yield "ln p(x) − ELBO is the gap in closed form", log_prob - elbo.item() - gap, EXACT
    yield "the gap is KL(q ‖ p(z | x))", q.kl(posterior).item() - gap, EXACT


def normalization(device: torch.device) -> Results:
    """Every likelihood's density integrates to one, its mass adds up to one."""
    line = torch.linspace(-40, 40, 400_001, dtype=torch.float64, device=device)
    unit = torch.linspace(0, 1, 20_001, dtype=torch.float64, device=device)
    levels = torch.linspace(0, 1, 17, dtype=torch.float64, device=device)
    logits = _normal(device, 17)
    cases: tuple[tuple[likelihoods.Likelihood, Tensor, Tensor, float], ...] = (
        (likelihoods.Gaussian(0.3), line, logits[:1], 1e-9),
        (likelihoods.HeteroscedasticGaussian(), line, logits[:2], 1e-9),
        (likelihoods.Laplace(0.3), line, logits[:1], 1e-6),
        (likelihoods.ContinuousBernoulli(), unit, logits[:1], 1e-8),
        (likelihoods.ContinuousBernoulli(), unit, 1e-3 * logits[:1], 1e-8),
        (likelihoods.Bernoulli(), levels[[0, -1]], logits[:1], EXACT),
        (likelihoods.DiscretizedLogistic(17), levels, logits[:2], EXACT),
        (likelihoods.DiscretizedLogisticMixture(3, 17), levels, logits[:9], EXACT),
        (likelihoods.Categorical(17), levels, logits, EXACT),
    )
    for likelihood, grid, parameters, tolerance in cases:
        x = grid.unsqueeze(1)
        p = likelihood.to(x).log_prob(x, parameters.expand(len(x), -1)).exp()
        discrete = len(grid) < 100
        total = p.sum() if discrete else torch.trapezoid(p, grid)
        kind = "Σ p" if discrete else "∫ p"
        name = f"{type(likelihood).__name__}{' near λ = ½' if parameters.abs().max() < 0.1 else ''}"
        yield f"{kind} = 1: {name}", total.item() - 1, tolerance


def mixtures(device: torch.device) -> Results:
    """ln of sums over components, and what is made of them."""
    mu, logvar = _normal(device, 12, 3), 0.5 * _normal(device, 12, 3, seed=1)
    z = _normal(device, 7, 3, seed=2)
    # Equal components are one; far apart, only one is left.
    same = ops.mixture_log_prob(z, mu[:1].expand(12, 3), logvar[:1])
    one = ops.gaussian_log_prob(z, mu[0], logvar[0])
    yield "a mixture of equal components is one of them", _largest(same - one), EXACT
    apart = mu + 1000 * torch.arange(12, dtype=mu.dtype, device=device).unsqueeze(1)
    nearest = ops.gaussian_log_prob(z[:1] + apart, apart, logvar) - math.log(12)
    found = ops.mixture_log_prob(z[:1] + apart, apart, logvar)
    yield "of components far apart the nearest counts, 1/K", _largest(found - nearest), EXACT
    pairs = ops.pairwise_log_prob(z, mu, logvar)
    mixture = ops.mixture_log_prob(z, mu, logvar) + math.log(12)
    yield "ln Σ exp of all pairs is the mixture", _largest(pairs.logsumexp(1) - mixture), EXACT
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64, device=device).unsqueeze(1)
    density = ops.mixture_log_prob(grid, mu[:, :1], logvar[:, :1]).exp()
    yield "∫ p = 1", torch.trapezoid(density, grid[:, 0]).item() - 1, EXACT


def aggregate_posterior(device: torch.device) -> Results:
    """Posteriors N(A x, s² I) of standard normal x: q(z) is N(0, A Aᵀ + s² I)."""
    n, size, s = 2000, 3, 0.5
    factor = 0.7 * _normal(device, size, size, seed=1)
    x = _normal(device, n, size)
    mu, logvar = x @ factor.T, torch.full((n, size), math.log(s**2)).to(x)
    z = mu + s * _normal(device, n, size, seed=2)
    covariance = factor @ factor.T + s**2 * torch.eye(size).to(x)
    correlation = 0.5 * (covariance.diagonal().log().sum() - torch.logdet(covariance)).item()
    joint, marginals = ops.aggregate_log_prob(z, mu, logvar)
    difference = joint - marginals
    yield (
        "total correlation = ½ (Σ ln Cᵢᵢ − ln det C)",
        (difference.mean().item() - correlation) / (difference.std().item() / math.sqrt(n)),
        STANDARD_ERRORS,
    )
    few = slice(6)
    density = ops.pairwise_log_prob(z[:1], mu[few], logvar[few]).exp()[0]
    estimates = []
    for others in itertools.combinations(range(1, 6), 2):
        batch = [0, *others]
        joint, _ = ops.aggregate_log_prob(z[batch], mu[batch], logvar[batch], dataset_size=6)
        estimates.append(joint[0].exp())
    mean = torch.stack(estimates).mean() / density.mean() - 1
    yield "stratified sampling: the mean over all batches is q(z)", mean, EXACT


def categorical_latents(device: torch.device) -> Results:
    logits, prior_logits = 2 * _normal(device, 2, 50, 8, 32)
    prior_logits.requires_grad_()
    kl = ops.balanced_categorical_kl_divergence(logits, 0 * logits)
    log_q = logits.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum((-2, -1))
    yield "KL to equal classes = Σ ln C − H(q)", _largest(kl - (8 * math.log(32) - entropy)), EXACT
    kl = ops.balanced_categorical_kl_divergence(logits, prior_logits, balance=1.0)
    (grad,) = torch.autograd.grad(kl.sum(), prior_logits)
    difference = prior_logits.softmax(-1) - logits.softmax(-1)
    yield "its gradient by the prior's logits is p − q", _largest(grad - difference), EXACT

    logits = logits[:1, 0].expand(4000, 32).contiguous().requires_grad_()
    z = ops.straight_through_categorical(logits, uniform_mix=0.1, seed=1)
    p = 0.9 * logits.softmax(-1) + 0.1 / 32
    error = (z.mean(0) - p[0]) / (p[0] * (1 - p[0]) / 4000).sqrt()
    yield (
        "classes are drawn as often as is likely (standard errors)",
        _largest(error),
        STANDARD_ERRORS,
    )
    weights = _normal(device, 4000, 32, seed=2)
    found, right = (torch.autograd.grad((y * weights).sum(), logits)[0] for y in (z, p))
    yield "and have the gradient of their probabilities", _largest(found - right), EXACT


CHECKS: dict[str, Callable[[torch.device], Results]] = {
    "probabilistic PCA": probabilistic_pca,
    "importance weights": importance_weighting,
    "gradients": gradient_estimators,
    "σ and β": sigma_and_beta,
    "KL": kl_divergences,
    "Gaussian toy": gaussian_toy,
    "categorical latents": categorical_latents,
    "likelihoods": normalization,
    "mixtures": mixtures,
    "aggregate posterior": aggregate_posterior,
}


def checks(device: torch.device | str = "cpu") -> Iterator[Check]:
    """All identities, one after the other."""
    for group, function in CHECKS.items():
        for identity, error, tolerance in function(torch.device(device)):
            yield Check(group, identity, abs(float(error)), tolerance)


# ---- The command line ----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m fastvae verify`."""
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument(
        "--backend",
        choices=CHOICES,
        help="kernels, or one of three ways in plain PyTorch (default: FASTVAE_BACKEND, or native)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the table, and return 0 if all identities hold, else 1."""
    start = time.perf_counter()
    with ExitStack() as stack:
        if arguments.backend is not None:
            stack.enter_context(use_backend(arguments.backend))
        backend = path(torch.empty(0, device=arguments.device))
        results = []
        group = None
        for check in checks(arguments.device):
            if check.group != group:
                group = check.group
                print(f"\n{group:<66}     error  tolerance")
            verdict = "ok" if check.holds else "FAILS"
            print(f"  {check.identity:<64} {check.error:9.1e}  {check.tolerance:9.1e}  {verdict}")
            results.append(check.holds)
    failed = len(results) - sum(results)
    said = f"{failed} of {len(results)} identities FAIL" if failed else f"all {len(results)} hold"
    print(f"\n{said}; {backend} backend, {arguments.device}, {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0
