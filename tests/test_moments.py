"""`DiagonalGaussianDistribution` has the interface and values of diffusers' class of that name."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from accuracy import seeded
from torch import Tensor

import fastvae
from fastvae import DiagonalGaussian, DiagonalGaussianDistribution

pytestmark = pytest.mark.usefixtures("on_device")

SHAPE = (3, 8, 5, 4)


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Moments some of which lie beyond the clamp."""
    generator = seeded(seed)
    params = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    params[0, 4, :2] = torch.tensor([-40.0, 25.0, -31.0, 20.5])
    return params.to(dtype)


def formulas(params: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = params.chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def test_moments() -> None:
    q = DiagonalGaussianDistribution(params := drawn())
    mean, logvar = formulas(params)
    assert q.parameters is params
    assert q.deterministic is False
    for found, want in (
        (q.mean, mean),
        (q.mode(), mean),
        (q.logvar, logvar),
        (q.std, (logvar / 2).exp()),
        (q.var, logvar.exp()),
    ):
        torch.testing.assert_close(found, want)
    assert q.logvar.min() == -30  # the clamp was met at both ends
    assert q.logvar.max() == 20


def test_kl_and_nll() -> None:
    leaf, other = drawn().requires_grad_(), drawn(1).clamp(-3, 3)
    q, p = DiagonalGaussianDistribution(leaf), DiagonalGaussianDistribution(other)
    (mean, logvar), (mean_p, logvar_p) = formulas(leaf), formulas(other)
    var, var_p = logvar.exp(), logvar_p.exp()
    x = drawn(2)[:, :4]
    nll = 0.5 * (math.log(2 * math.pi) + logvar + (x - mean) ** 2 / var)
    to_p = 0.5 * ((mean - mean_p) ** 2 / var_p + var / var_p - 1 - logvar + logvar_p)
    pairs = [
        (q.kl(), 0.5 * (mean**2 + var - 1 - logvar).sum([1, 2, 3])),
        (q.kl(p), to_p.sum([1, 2, 3])),
        (q.kl(DiagonalGaussian.from_params(other)), to_p.sum([1, 2, 3])),
        (q.nll(x), nll.sum([1, 2, 3])),
        *((q.nll(x, dims), nll.sum(dims)) for dims in ([1, 2, 3], (2, 3), [1], [-1, 0], [3, 1])),
    ]
    for found, want in pairs:
        assert found.shape == want.shape
        torch.testing.assert_close(found, want)
        ours, right = (
            torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for y in (found, want)
        )
        torch.testing.assert_close(ours, right)
        assert ours[0, 4, 0, 0] == 0  # a clamp's gradient
        assert not torch.allclose(found, want + 1e-3 * want.abs())


def test_samples() -> None:
    leaf = drawn().requires_grad_()
    q = DiagonalGaussianDistribution(leaf)
    mean, logvar = formulas(leaf)
    z = q.sample(seeded(3))
    gaussian = DiagonalGaussian(mean, logvar)
    assert torch.equal(z, gaussian.rsample(generator=seeded(3)))
    assert torch.autograd.grad(z.sum(), leaf)[0][:, :4].eq(1).all()
    torch.manual_seed(1)
    first = q.sample()
    torch.manual_seed(1)
    assert torch.equal(q.sample(), first)
    assert not torch.equal(q.sample(), first)
    many = [seeded(k) for k in range(3)]
    alone = DiagonalGaussianDistribution(leaf[1:2]).sample([seeded(1)])
    torch.testing.assert_close(q.sample(many)[1:2], alone)


def test_deterministic() -> None:
    params = drawn()
    q, p = (DiagonalGaussianDistribution(params, deterministic=d) for d in (True, False))
    for found in (q.kl(), q.kl(p), q.nll(params[:, :4])):
        assert torch.equal(found, torch.zeros(1))
    assert torch.equal(q.sample(), q.mean)
    assert not q.std.any()
    assert not q.var.any()
    assert p.kl(q).isinf().all()  # to a point mass
    assert not p.kl(p).any()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_sum_in_float32(half: torch.dtype) -> None:
    params = (drawn() * 1e-2).to(half)
    q, right = DiagonalGaussianDistribution(params), DiagonalGaussianDistribution(params.double())
    assert q.sample().dtype == half
    assert q.kl().dtype == torch.float32
    torch.testing.assert_close(q.kl().double(), right.kl(), rtol=1e-5, atol=0)


def test_other_shapes_and_bad_ones() -> None:
    video = torch.randn(2, 6, 3, 4, 5)
    assert DiagonalGaussianDistribution(video).kl().shape == (2,)
    with pytest.raises(ValueError, match=r"params has shape \[2, 5\]; want an even size"):
        DiagonalGaussianDistribution(torch.zeros(2, 5))
    q = pickle.loads(pickle.dumps(DiagonalGaussianDistribution(video)))
    assert torch.equal(q.mean, video[:, :3])


def test_the_same_as_diffusers() -> None:
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    params, x = drawn(), drawn(2)[:, :4]
    ours, theirs = DiagonalGaussianDistribution(params), vae.DiagonalGaussianDistribution(params)
    other = drawn(1).clamp(-3, 3)
    p, their_p = DiagonalGaussianDistribution(other), vae.DiagonalGaussianDistribution(other)
    for name in ("mean", "logvar", "std", "var", "parameters", "deterministic"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.kl(), theirs.kl())
    torch.testing.assert_close(ours.kl(p), theirs.kl(their_p))
    torch.testing.assert_close(ours.kl(their_p), theirs.kl(their_p))
    torch.testing.assert_close(ours.nll(x), theirs.nll(x))
    torch.testing.assert_close(ours.nll(x, [1, 2]), theirs.nll(x, [1, 2]))
    point, their_point = (
        kind(params, deterministic=True)
        for kind in (DiagonalGaussianDistribution, vae.DiagonalGaussianDistribution)
    )
    assert torch.equal(point.kl(), their_point.kl())
    assert torch.equal(point.nll(x), their_point.nll(x))
    assert torch.equal(point.sample(), their_point.sample())
    assert fastvae.DiagonalGaussianDistribution.__name__ == type(theirs).__name__
