"""The patches of diffusers, pythae and multivae compute what the originals do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace, Normal

from fastvae.integrations.patching import Patch


def twice(value: float, *, factor: float = 2.0) -> float:
    return factor * value


def test_a_function_imported_by_name_follows_the_patch() -> None:
    by_name = twice

    def refuse_two(value: float, *, factor: float = 2.0) -> Any:
        return NotImplemented if value == 2 else -factor * value

    with Patch() as patch:
        patch.replace_function(twice, refuse_two)  # type: ignore[arg-type]
        assert by_name(3) == -6
        assert by_name(3, factor=3) == -9
        assert by_name(2) == 4
        assert patch.served == {"twice": 2}
        assert patch.passed_on == {"twice": 1}
    assert by_name(3) == 6
    assert by_name(3, factor=5) == 15


def upstream(t: Tensor) -> Tensor:
    """A gradient that is not of ones."""
    return torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).reshape(t.shape).to(t.dtype)


def compare(
    compute: Callable[[], Any], leaves: list[Tensor], patch: Patch, served: str, rtol: float = 2e-5
) -> None:
    """Values, dtypes, shapes and gradients of `compute` with the patch, which is undone, and
    without."""

    def results() -> tuple[list[Tensor], list[list[Tensor | None]]]:
        values = compute()
        values = [values] if isinstance(values, Tensor) else list(values)
        roots = [(v * upstream(v)).sum() for v in values]
        return values, [
            list(torch.autograd.grad(r, leaves, allow_unused=True, retain_graph=True))
            for r in roots
        ]

    with patch:
        got = results()
    assert patch.served[served] > 0, str(patch)
    want = results()
    half = leaves[0].dtype.itemsize == 2
    tolerance = {"rtol": 2e-2, "atol": 0.2} if half else {"rtol": rtol, "atol": rtol}
    pairs = list(zip(got[0], want[0], strict=True))
    for ours, theirs in zip(got[1], want[1], strict=True):
        pairs += zip(ours, theirs, strict=True)
    for mine, original in pairs:
        assert (mine is None) == (original is None)
        if mine is not None and original is not None:
            assert (mine.dtype, mine.shape) == (original.dtype, original.shape)
            torch.testing.assert_close(mine.double(), original.double(), **tolerance)


def normals(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    return numbers.to(dtype).requires_grad_()


# ---- diffusers -----------------------------------------------------------------------------------


@pytest.fixture
def diffusers() -> Any:
    pytest.importorskip("diffusers")
    from fastvae.integrations import diffusers

    return diffusers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (2, 4, 3, 5, 6)], ids=["image", "video"])
def test_diffusers_posteriors(diffusers: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    wide = shape[0], 2 * shape[1], *shape[2:]
    q, p = normals(*wide, dtype=dtype), normals(*wide, dtype=dtype, seed=1)
    x = normals(*shape, dtype=dtype, seed=2)

    def posteriors() -> tuple[Any, Any]:
        return DiagonalGaussianDistribution(q), DiagonalGaussianDistribution(p)

    name = "DiagonalGaussianDistribution"
    compare(lambda: posteriors()[0].kl(), [q], diffusers.patch(), f"{name}.kl")
    compare(lambda: posteriors()[0].kl(posteriors()[1]), [q, p], diffusers.patch(), f"{name}.kl")
    for dims in ([1, 2, 3], [-1], [0, 2], 1):
        compare(
            lambda dims=dims: posteriors()[0].nll(x, dims=dims),
            [q, x],
            diffusers.patch(),
            f"{name}.nll",
        )


def test_diffusers_audio_and_what_is_passed_on(diffusers: Any) -> None:
    from diffusers.models.autoencoders import autoencoder_oobleck, vae

    q = normals(2, 8, 9)
    audio = autoencoder_oobleck.OobleckDiagonalGaussianDistribution
    compare(lambda: audio(q).kl(), [q], diffusers.patch(), f"{audio.__name__}.kl")
    before = vae.DiagonalGaussianDistribution.kl
    with diffusers.patch() as patch:
        still = vae.DiagonalGaussianDistribution(normals(2, 8, 4, 4), deterministic=True)
        assert torch.equal(still.sample(), still.mean)
        assert still.kl().tolist() == [0]
        with pytest.raises(IndexError):
            vae.DiagonalGaussianDistribution(q).kl()  # of three dimensions, as without the patch
    assert not patch.served
    assert vae.DiagonalGaussianDistribution.kl is before


def test_diffusers_generators_decide_the_noise(diffusers: Any) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    parameters = normals(3, 8, 16, 16)
    q = DiagonalGaussianDistribution(parameters)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]

    with diffusers.patch():
        z = q.sample(generator=generators()[0])
        assert torch.equal(z, q.sample(generator=generators()[0]))
        assert not torch.equal(z, q.sample(generator=generators()[1]))
        torch.manual_seed(0)
        first = q.sample()
        torch.manual_seed(0)
        assert torch.equal(first, q.sample())
        together = q.sample(generator=generators())
        alone = DiagonalGaussianDistribution(parameters[1:2]).sample(generator=generators()[1])
        assert torch.equal(together[1:2], alone)
        with pytest.raises(IndexError):
            q.sample(generator=generators()[:2])
        eps = (q.sample() - q.mean) / q.std
        assert abs(eps.std().item() - 1) < 0.06
        z = q.sample()
        (grad,) = torch.autograd.grad(z.sum(), parameters)
    assert grad[:, :4].eq(1).all()
    torch.testing.assert_close(grad[:, 4:], 0.5 * (z - q.mean).detach())


def test_a_patched_posterior_compiles_as_one_graph(diffusers: Any) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    def loss(parameters: Tensor) -> Tensor:
        q = DiagonalGaussianDistribution(parameters)
        return q.sample().sum() + q.kl().sum()

    with diffusers.patch():
        torch.compile(loss, fullgraph=True, backend="eager")(normals(2, 8, 4, 4))


# ---- pythae --------------------------------------------------------------------------------------


@pytest.fixture
def pythae() -> Any:
    pytest.importorskip("pythae")
    from fastvae.integrations import pythae

    return pythae


def pythae_model(name: str, **settings: Any) -> Any:
    from pythae import models

    torch.manual_seed(0)
    infix = "_" if name.endswith("_MMD") else ""
    config = getattr(models, f"{name}{infix}Config")(input_dim=(1, 6, 6), latent_dim=5, **settings)
    return getattr(models, name)(config).train()


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize(
    ("name", "settings", "extra"),
    [
        ("VAE", {}, ()),
        ("BetaVAE", {"beta": 3.0}, ()),
        ("DisentangledBetaVAE", {"beta": 3.0, "C": 2.0, "warmup_epoch": 4}, (3,)),
        ("BetaTCVAE", {"beta": 3.0, "use_mss": True}, (50,)),
        ("BetaTCVAE", {"beta": 3.0, "use_mss": True}, (8,)),
        ("BetaTCVAE", {"gamma": 3.0, "use_mss": False}, (50,)),
    ],
)
def test_pythae_losses(
    pythae: Any, name: str, settings: dict[str, Any], extra: tuple[int, ...], loss: str
) -> None:
    model = pythae_model(name, reconstruction_loss=loss, **settings)
    mu, log_var, z = (normals(8, 5, seed=seed) for seed in range(3))
    x = torch.rand(8, 1, 6, 6)
    recon = torch.rand(8, 1, 6, 6).requires_grad_()
    compare(
        lambda: model.loss_function(recon, x, mu, log_var, z, *extra),
        [recon, mu, log_var, z],
        pythae.patch(),
        f"{name}.loss_function",
    )


def test_pythae_vamp_prior(pythae: Any) -> None:
    model = pythae_model("VAMP", number_components=7)
    z = normals(8, 5)
    leaves = [z, *(p for p in model.pseudo_inputs.parameters())]
    compare(lambda: model._log_p_z(z), leaves, pythae.patch(), "VAMP._log_p_z", rtol=1e-4)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
@pytest.mark.parametrize("name", ["INFOVAE_MMD", "WAE_MMD"])
def test_pythae_mmd_kernels(pythae: Any, name: str, kernel: str) -> None:
    model = pythae_model(name, kernel_choice=kernel)
    a, b = normals(8, 5), normals(8, 5, seed=1)
    method = f"{kernel}_kernel"
    for other, leaves in ((b, [a, b]), (a, [a])):
        compare(
            lambda other=other: getattr(model, method)(a, other),
            leaves,
            pythae.patch(),
            f"{name}.{method}",
        )


def test_pythae_sampling(pythae: Any) -> None:
    model = pythae_model("VAE")
    mu, std = normals(200, 100), torch.full((200, 100), 0.5, requires_grad=True)
    with pythae.patch() as patch:
        torch.manual_seed(0)
        z, eps = model._sample_gauss(mu, std)
        torch.manual_seed(0)
        assert torch.equal(model._sample_gauss(mu, std)[0], z)
        model._sample_gauss(mu[:2], std[:2])
    assert (patch.served["VAE._sample_gauss"], patch.passed_on["VAE._sample_gauss"]) == (2, 1)
    torch.testing.assert_close(z, mu + eps * std)
    assert abs(eps.std().item() - 1) < 0.03
    assert len(eps.unique()) > 19_000  # not one row, expanded
    torch.testing.assert_close(torch.autograd.grad(z.sum(), std)[0], eps)


# ---- multivae ------------------------------------------------------------------------------------


@pytest.fixture
def multivae() -> Any:
    pytest.importorskip("multivae")
    from fastvae.integrations import multivae

    return multivae


def test_multivae_divergences(multivae: Any) -> None:
    from multivae.models import MoPoE
    from multivae.models.dmvae.dmvae_model import kl_divergence  # imported before the patch

    q, s, p, t = (normals(6, 5, seed=seed) for seed in range(4))
    compare(lambda: kl_divergence(q, s, p, t), [q, s, p, t], multivae.patch(), "kl_divergence")
    mus, logvars = normals(3, 6, 5), normals(3, 6, 5, seed=1)
    weights = torch.full((3, 6), 1 / 3)
    compare(
        lambda: MoPoE.calc_joint_divergence(None, mus, logvars, weights)["joint_divergence"],
        [mus, logvars],
        multivae.patch(),
        "MoPoE.calc_joint_divergence",
    )


@pytest.mark.parametrize("family", [Normal, Laplace])
def test_multivae_likelihoods(multivae: Any, family: Any) -> None:
    x, mean = normals(4, 3, 5), normals(4, 3, 5, seed=1)
    scale = normals(5, seed=2).detach().abs().add(0.1).requires_grad_()
    label = f"{family.__name__}.log_prob"
    compare(lambda: family(mean, 0.75).log_prob(x), [mean, x], multivae.patch(), label)
    compare(lambda: family(mean, scale).log_prob(x), [mean, scale, x], multivae.patch(), label)
    compare(lambda: family(mean, 1.0).log_prob(x[0]), [mean, x], multivae.patch(), label)
    with multivae.patch(), pytest.raises(ValueError, match="within the support"):
        family(mean, 1.0, validate_args=True).log_prob(torch.full((4, 3, 5), math.nan))


def test_multivae_samples(multivae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from multivae.models.mvae.mvae_model import rsample_from_gaussian

    mu, log_var = normals(50, 40), normals(50, 40, seed=1)
    settings: list[dict[str, Any]] = [{}, {"N": 3}, {"N": 3, "flatten": True}]
    shapes = [rsample_from_gaussian(mu, log_var, **given).shape for given in settings]
    one = [rsample_from_gaussian(mu[0], log_var[0], **given).shape for given in settings]
    with multivae.patch() as patch:
        assert [rsample_from_gaussian(mu, log_var, **given).shape for given in settings] == shapes
        assert [
            rsample_from_gaussian(mu[0], log_var[0], **given).shape for given in settings
        ] == one
        torch.manual_seed(0)
        z = rsample_from_gaussian(mu, log_var)
        torch.manual_seed(0)
        assert torch.equal(rsample_from_gaussian(mu, log_var), z)
        served = patch.served["rsample_from_gaussian"]
        assert rsample_from_gaussian(mu, log_var, return_mean=True) is mu
        assert patch.served["rsample_from_gaussian"] == served == 8
        monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile switches it off
        with pytest.raises(ValueError, match="parameter"):
            rsample_from_gaussian(mu * math.nan, log_var)
    eps = (z - mu) * (-0.5 * log_var).exp()
    assert abs(eps.std().item() - 1) < 0.06
    torch.testing.assert_close(torch.autograd.grad(z.sum(), log_var)[0], 0.5 * (z - mu).detach())
