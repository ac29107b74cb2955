"""`VAE` is the plain PyTorch that it says it is equivalent to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

import fastvae
from fastvae import ELBO, VAE, Beta, Bound, Gaussian, reference

B, D, L = 6, 12, 4


@pytest.fixture(params=["native", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and fastvae.info()["build"] is None:
        pytest.skip("no binary")
    with fastvae.use_backend(request.param):
        yield request.param


def make(device: torch.device, latent: int = L, **options: object) -> tuple[VAE, Tensor]:
    """A small model and its data, in float64."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 2 * latent))
    decoder = nn.Sequential(nn.Linear(latent, 16), nn.Tanh(), nn.Linear(16, D))
    model = VAE(encoder, decoder, latent_shape=latent, **options).double().to(device)
    return model, torch.rand(B, D, dtype=torch.float64).to(device)


def plain(model: VAE, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-likelihood and KL of N(mu, e^logvar), in plain PyTorch."""
    mu, logvar = model.encoder(x).chunk(2, dim=1)
    q = Independent(Normal(mu, (logvar / 2).exp()), 1)
    p = Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1)
    mean = model.decoder(mu + (logvar / 2).exp() * eps)
    log_likelihood = Independent(Normal(mean, model.likelihood.sigma), 1).log_prob(x)
    kl = kl_divergence(q, p)
    return (model.objective.penalty.beta * kl - log_likelihood).mean(), log_likelihood, kl


@pytest.mark.parametrize("latent", [1, 2, L])
def test_values_and_gradients_are_those_of_plain_pytorch(device: torch.device, latent: int) -> None:
    model, x = make(device, latent, objective=ELBO(Beta(0.7)), likelihood=Gaussian(0.3))
    seed = torch.tensor(5, device=device)
    output = model(x, seed=seed)
    eps = reference.noise(seed, torch.Size([B, latent])).double()
    loss, log_likelihood, kl = plain(model, x, eps)
    assert output.loss.shape == ()
    assert output.log_likelihood.shape == output.kl.shape == (B,)
    assert output.z.shape == (B, latent)
    # The kernels' float32 normals are a few units in the last place from the reference's.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(output.kl, kl)
    torch.testing.assert_close(output.log_likelihood, log_likelihood, **close)
    torch.testing.assert_close(output.loss, loss, **close)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for got, want in zip(gradients, expected, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want, **close)

    other = plain(model, x, reference.noise(seed + 1, torch.Size([B, latent])).double())[0]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(output.loss, other, **close)


def test_beta_and_sigma_are_read_at_each_call(device: torch.device) -> None:
    model, x = make(device)
    model.objective.penalty.beta, model.likelihood.sigma = 0.0, 2.0
    output = model(x, seed=0)
    torch.testing.assert_close(output.loss, -output.log_likelihood.mean())
    expected = Independent(Normal(output.decoded, 2.0), 1).log_prob(x)
    torch.testing.assert_close(output.log_likelihood, expected)


def test_noise_comes_from_seed_generator_or_torch(device: torch.device) -> None:
    model, x = make(device)
    for make_noise in (
        lambda k: {"seed": k},
        lambda k: {"generator": torch.Generator(device).manual_seed(k)},
        lambda k: (torch.manual_seed(k), {})[1],
    ):
        first, again, other = (model(x, **make_noise(k)).z for k in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_encode_decode_reconstruct(device: torch.device) -> None:
    model, x = make(device)
    mu, logvar = model.encoder(x).chunk(2, dim=1)
    q = model.encode(x)
    assert q.batch_shape == (B,)
    torch.testing.assert_close(q.mean, mu)
    torch.testing.assert_close(q.stddev, (logvar / 2).exp())
    torch.testing.assert_close(model.reconstruct(x), model.decoder(mu))
    assert model.reconstruct(x).requires_grad


def test_sample(device: torch.device) -> None:
    model, _ = make(device)
    few, more = model.sample(3, seed=1), model.sample(5, seed=1)
    assert few.shape == (3, D)
    assert few.dtype == torch.float64
    assert not few.requires_grad
    torch.testing.assert_close(more[:3], few)
    assert not torch.equal(model.sample(3, seed=2), few)
    model.decoder = nn.Identity()
    z = model.sample(20_000, seed=0)
    assert z.mean().abs() < 0.02
    assert abs(z.std().item() - 1) < 0.02
    with pytest.raises(ValueError, match="latent_shape is None"):
        VAE(nn.Identity(), nn.Identity()).sample()


def test_images_and_a_latent_with_places(device: torch.device) -> None:
    model = VAE(
        nn.Conv2d(3, 8, 2, stride=2),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        latent_shape=(4, 5, 5),
    ).to(device)
    x = torch.rand(2, 3, 10, 10, device=device)
    output = model(x)
    assert output.kl.shape == output.log_likelihood.shape == (2,)
    assert output.z.shape == (2, 4, 5, 5)
    assert output.decoded.shape == x.shape
    assert model.sample(7).shape == (7, 3, 10, 10)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_other_packing(device: torch.device) -> None:
    """Halves along the last dimension, standard deviations in the second."""

    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, 0.5 * torch.ones_like(x)], dim=2)

    x = torch.rand(B, 3, 2, device=device)
    model = VAE(Encoder(), nn.Identity(), dim=2, param="std")
    q = Independent(Normal(x, 0.5), 2)
    p = Independent(Normal(torch.zeros_like(x), 1.0), 2)
    torch.testing.assert_close(model(x).kl, kl_divergence(q, p))


def test_autocast(device: torch.device) -> None:
    model, x = make(device)
    model, x = model.float(), x.float()
    expected = model(x, seed=0).loss
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(x, seed=0).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> object:
        return self.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": Bound(), "param": "std"}, "bound is given; want param='logvar'"),
        ({"latent_shape": 0}, r"latent_shape is \[0\]; want"),
        ({"param": "variance"}, "param is 'variance'; want"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAE(nn.Identity(), nn.Identity(), **options)


def test_whole_numbers_of_numpy(device: torch.device) -> None:
    model, x = make(device, np.int64(L))
    assert model.latent_shape == (L,)
    assert fastvae.LearnedGaussianPrior(np.int32(L)).mu.shape == (1, L)
    assert fastvae.MixturePrior(3, (np.int64(2), np.int64(2))).mu.shape == (3, 2, 2)
    loss = model(x, seed=5).loss
    assert torch.equal(model(x, seed=np.int64(5)).loss, loss)
    model.objective = ELBO(samples=np.int64(3))
    assert model(x, seed=5).z.shape == (3, B, L)
    assert torch.equal(model.sample(2, seed=np.int64(1)), model.sample(2, seed=1))
    for seed in (1, np.int64(1)):
        assert model.report(x, samples=np.int64(4), seed=seed) == model.report(x, samples=4, seed=1)
    value = model.log_likelihood(x, np.int64(20), seed=np.int64(1)).value
    assert torch.equal(value, model.log_likelihood(x, 20, seed=1).value)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda model, x: ELBO(2.0), r"penalty is 2.0; want a penalty, such as fastvae.Beta\(2.0"),
        (lambda model, x: ELBO(samples=2.0), "samples is 2.0; want a whole number"),
        (lambda model, x: fastvae.IWAE(5.0), "samples is 5.0; want a whole number"),
        (lambda model, x: fastvae.DReG(True), "samples is True; want a whole number"),
        (lambda model, x: VAE(model.encoder, model.decoder, latent_shape=4.0), "latent_shape is 4"),
        (lambda model, x: model(x, seed=5.0), "seed is 5.0; want an int"),
        (lambda model, x: model.log_likelihood(x, 5.0), "n_samples is 5.0; want a whole number"),
        (lambda model, x: model.report(x, samples=5.0), "samples is 5.0; want a whole number"),
    ],
)
def test_what_is_no_whole_number(make_it: object, message: str, device: torch.device) -> None:
    with pytest.raises(TypeError, match=message):
        make_it(*make(device))


@pytest.mark.parametrize(
    ("encoded", "decoded", "error", "message"),
    [
        ((torch.zeros(B, 4),) * 2, None, TypeError, "encoder returned a tuple; want one tensor"),
        (torch.zeros(B, 5), None, ValueError, r"shape \[6, 5\]; want an even size"),
        (torch.zeros(B, 6), None, ValueError, r"latent_shape of \[3\]; want \[4\]"),
        (torch.zeros(B, 8), torch.zeros(B, 1), ValueError, r"decoder returned shape \[6, 1\]"),
    ],
)
def test_bad_modules(
    encoded: object, decoded: object, error: type[Exception], message: str
) -> None:
    model = VAE(Returns(encoded), Returns(decoded), latent_shape=4)
    with pytest.raises(error, match=message):
        model(torch.zeros(B, D))
