"""`DiagonalGaussian` is `Independent(Normal)`, over the fused ops."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accuracy import same_bits
from cases import PARAMS, from_logvar
from torch.distributions import Independent, Normal, kl_divergence

import fastvae
from fastvae import CholeskyGaussian, DiagonalGaussian

SHAPES = ((), (5,), (4, 6), (2, 4, 3, 5))


def pair(
    shape: tuple[int, ...], param: str = "logvar", event_ndim: int | None = None, seed: int = 0
) -> tuple[DiagonalGaussian, Independent]:
    generator = torch.Generator().manual_seed(seed)
    mu, logvar = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "ms")
    ours = DiagonalGaussian(mu, from_logvar(logvar, param), param=param, event_ndim=event_ndim)
    return ours, Independent(Normal(mu, (logvar / 2).exp()), ours.event_ndim)


def cases() -> list[tuple[tuple[int, ...], str, int | None]]:
    return [
        (shape, param, event_ndim)
        for shape in SHAPES
        for param in PARAMS
        for event_ndim in (None, *range(len(shape) + 1))
    ]


each_param = pytest.mark.parametrize("param", PARAMS)


def test_same_as_independent_normal() -> None:
    for case in cases():
        ours, theirs = pair(*case)
        assert ours.batch_shape == theirs.batch_shape
        assert ours.event_shape == theirs.event_shape
        assert ours.has_rsample
        x = torch.randn(3, *case[0], dtype=torch.float64)
        for name in ("mean", "mode", "stddev", "variance"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
        torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
        torch.testing.assert_close(ours.log_prob(x[0]), theirs.log_prob(x[0]))
        torch.testing.assert_close(ours.entropy(), theirs.entropy())
        for sample_shape in ((), (7,), (2, 3)):
            assert ours.sample(sample_shape).shape == theirs.sample(sample_shape).shape
            assert ours.rsample(sample_shape).shape == theirs.rsample(sample_shape).shape
        assert ours.support.event_dim == theirs.support.event_dim
        assert torch.equal(ours.support.check(x), theirs.support.check(x))


def test_kl_is_registered_and_the_same() -> None:
    for case in cases():
        ours, theirs = pair(*case)
        prior, their_prior = pair(*case, seed=1)
        standard = Independent(
            Normal(torch.zeros_like(theirs.mean), torch.ones_like(theirs.mean)), ours.event_ndim
        )
        torch.testing.assert_close(kl_divergence(ours, prior), kl_divergence(theirs, their_prior))
        torch.testing.assert_close(ours.kl(prior), kl_divergence(theirs, their_prior))
        torch.testing.assert_close(ours.kl(), kl_divergence(theirs, standard))


@each_param
def test_prior_of_another_parameterization(param: str) -> None:
    ours, theirs = pair((4, 6))
    prior, their_prior = pair((4, 6), param, seed=1)
    torch.testing.assert_close(ours.kl(prior), kl_divergence(theirs, their_prior))
    torch.testing.assert_close(prior.kl(ours), kl_divergence(their_prior, theirs))


def test_expand() -> None:
    for shape, batch in (((1, 6), (5,)), ((6,), (3, 6)), ((2, 4, 3), (7, 2))):
        ours, theirs = pair(shape, event_ndim=None if len(shape) > 1 else 0)
        wide, their_wide = ours.expand(batch), theirs.expand(batch)
        assert wide.batch_shape == their_wide.batch_shape
        assert wide.event_shape == their_wide.event_shape
        x = torch.randn(*batch, *ours.event_shape, dtype=torch.float64)
        torch.testing.assert_close(wide.log_prob(x), their_wide.log_prob(x))
        torch.testing.assert_close(wide.entropy(), their_wide.entropy())
        assert wide.rsample().shape == x.shape


def test_the_standard_normal_from_numbers() -> None:
    prior = DiagonalGaussian(0.0, 0.0)
    assert prior.mean == 0
    assert prior.stddev == 1
    ours, _ = pair((4, 6), event_ndim=0)
    single = DiagonalGaussian(ours.mu.float(), ours.logvar.float(), event_ndim=0)
    torch.testing.assert_close(single.kl(prior), single.kl())


def test_sample_has_no_gradient_and_rsample_has() -> None:
    mu = torch.zeros(4, 6, requires_grad=True)
    q = DiagonalGaussian(mu, mu)
    assert not q.sample().requires_grad
    assert q.rsample().requires_grad


def test_the_ops_are_those_of_the_package(device: torch.device) -> None:
    mu, s = (torch.randn(4, 6, device=device) for _ in "ms")
    q = DiagonalGaussian(mu, s)
    prior = DiagonalGaussian(s, mu)
    assert same_bits(q.rsample((2,), seed=3), fastvae.rsample(mu, s, sample_shape=(2,), seed=3))
    assert same_bits(q.kl(), fastvae.kl_divergence(mu, s))
    assert same_bits(q.kl(prior), fastvae.kl_divergence(mu, s, s, mu))
    for ours, theirs in (
        (q.rsample_kl(seed=3), fastvae.rsample_kl(mu, s, seed=3)),
        (q.rsample_kl(prior, seed=3), fastvae.rsample_kl(mu, s, s, mu, seed=3)),
    ):
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.manual_seed(1)
    first = q.sample()
    torch.manual_seed(1)
    assert torch.equal(q.rsample(), first)


# ---- What PyTorch's distributions have, and what they have not -----------------------------------


def test_names_of_torch_distributions() -> None:
    for case in cases():
        ours, theirs = pair(*case)
        base = theirs.base_dist
        torch.testing.assert_close(ours.loc, base.loc)
        torch.testing.assert_close(ours.scale, base.scale)
        assert isinstance(ours.base_dist, Normal)
        assert ours.base_dist.batch_shape == base.batch_shape
        assert ours.event_dim == theirs.support.event_dim == len(theirs.event_shape)
        x = torch.randn(3, *case[0], dtype=torch.float64)
        torch.testing.assert_close(ours.cdf(x), base.cdf(x))
        probability = torch.rand(3, *case[0], dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        torch.testing.assert_close(ours.icdf(probability), base.icdf(probability))
        torch.testing.assert_close(ours.cdf(ours.icdf(probability)), probability)
        rebuilt = Independent(ours.base_dist, ours.event_dim)
        torch.testing.assert_close(rebuilt.log_prob(x), ours.log_prob(x))


def test_tails_of_the_cdf() -> None:
    """Where 1 + erf has no digit left."""
    x = torch.tensor(-8.0)
    assert Normal(0.0, 1.0).cdf(x) == 0
    assert DiagonalGaussian(0.0, 0.0).cdf(x).item() == pytest.approx(6.22e-16, rel=1e-3)


class Named(DiagonalGaussian):
    """A subclass without an `__init__` of its own."""

    name = "q"


class Full(CholeskyGaussian):
    """The same with full covariance."""


class Initialized(DiagonalGaussian):
    """A subclass with one."""

    def __init__(self, mu: torch.Tensor, tag: str) -> None:
        super().__init__(mu, 0.0)
        self.tag = tag


def test_expand_and_detach_keep_the_subclass() -> None:
    params = torch.randn(4, 6, requires_grad=True)
    for q in (
        Named(params, params),
        Named.from_params(params),
        Named(params, params.exp(), param="std", validate_args=True),
        Full(params, torch.eye(6)),
    ):
        x = torch.randn(q.batch_shape + q.event_shape)
        for new in (q.detach(), q.expand((2, *q.batch_shape)), q.detach().expand(q.batch_shape)):
            assert type(new) is type(q)
            torch.testing.assert_close(new.log_prob(x).expand(2, -1)[0], q.log_prob(x))
            assert new._validate_args == q._validate_args
        assert q.expand((2, *q.batch_shape)).log_prob(x).requires_grad
        constant = q.detach()
        for value in (constant.log_prob(x), constant.kl(), constant.rsample(seed=0)):
            assert not value.requires_grad
        assert torch.equal(constant.rsample(seed=0), q.rsample(seed=0))
        assert q.log_prob(x).requires_grad  # as before
    own = Initialized(params, "mine")
    assert own.detach().tag == "mine"
    with pytest.raises(NotImplementedError, match="Initialized"):  # as in PyTorch
        own.expand((2, 4))


def test_sample_takes_seeds_and_generators(device: torch.device) -> None:
    mu, s = torch.randn(2, 4, 6, device=device, requires_grad=True)
    tril = torch.eye(6, device=device).expand(4, 6, 6)
    for q in (DiagonalGaussian(mu, s), CholeskyGaussian(mu, tril)):
        seeds = torch.arange(4, device=device)
        for given in ({"seed": 3}, {"seed": seeds}):
            z = q.sample((2,), **given)
            assert torch.equal(z, q.rsample((2,), **given))
            assert not z.requires_grad
        for count in (1, 4):
            many = [[torch.Generator(device).manual_seed(k) for k in range(count)] for _ in "ab"]
            assert torch.equal(q.sample(generator=many[0]), q.rsample(generator=many[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_samples_with_their_noise(dtype: torch.dtype, device: torch.device) -> None:
    params = torch.randn(4, 12, device=device, dtype=dtype, requires_grad=True)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for q in (
        DiagonalGaussian.from_params(params),
        DiagonalGaussian(params[:, :6], 0.3),
        DiagonalGaussian(params[:1, :6], params[:, 6:].exp(), param="std"),
        CholeskyGaussian(params[:, :6], torch.eye(6, device=device) + 0.1),
    ):
        full = isinstance(q, CholeskyGaussian)
        for shape in ((), (3,)):
            z, eps = q.rsample_with_eps(shape, seed=7)
            assert torch.equal(z, q.rsample(shape, seed=7))
            assert eps.dtype == wide
            assert z.requires_grad
            assert not eps.requires_grad
            step = (q.scale_tril @ eps.unsqueeze(-1)).squeeze(-1) if full else q.stddev * eps
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(
                z.to(wide), (q.mean + step).to(wide), rtol=tolerance, atol=tolerance
            )
        torch.manual_seed(1)
        z, eps = q.rsample_with_eps()
        torch.manual_seed(1)
        assert torch.equal(z, q.rsample())
        assert eps.std() > 0.5


def test_dtypes_promote() -> None:
    """The widest is taken, and whole numbers are data."""
    mu, tril, x = torch.randn(4, 6), torch.eye(6), torch.randn(4, 6)
    for left, right, want in (
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float16, torch.bfloat16, torch.float32),
    ):
        for q in (
            DiagonalGaussian(mu.to(left), torch.zeros((), dtype=right)),
            CholeskyGaussian(mu.to(left), tril.to(right)),
        ):
            assert q.rsample().dtype == want
            assert q.kl().dtype == q.entropy().dtype == want
            for value in (x, x.double(), x > 0, (3 * x).int()):
                wide = torch.promote_types(want, value.dtype)
                found = q.log_prob(value)
                assert found.dtype == wide
                exact = type(q)(
                    mu.to(left).double(), 0.0 if isinstance(q, DiagonalGaussian) else tril.double()
                )
                torch.testing.assert_close(
                    found.double(), exact.log_prob(value.double()), rtol=1e-4, atol=1e-4
                )


# ---- Keeping, copying, refusing ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pair", "packed", "packed and used"])
def test_pickle_and_deepcopy(kind: str) -> None:
    params = torch.randn(4, 12)
    if kind == "pair":
        q = DiagonalGaussian(*params.chunk(2, 1))
    else:
        q = DiagonalGaussian.from_params(params)
    if kind == "packed and used":
        q.log_prob(torch.zeros(4, 6))
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(q)),
        copy.deepcopy(q),
        copy.copy(q),
        torch.load(buffer, weights_only=False),
    ):
        assert repr(twin) == repr(q)
        assert torch.equal(twin.kl(), q.kl())
        assert torch.equal(twin.mean, q.mean)
        assert torch.equal(twin.rsample(seed=1), q.rsample(seed=1))


def test_validation_is_off_unless_asked_for() -> None:
    value = torch.full((4, 6), torch.nan)
    mu = torch.zeros(4, 6)
    assert DiagonalGaussian(mu, mu).log_prob(value).isnan().all()
    with pytest.raises(ValueError, match="within the support"):
        DiagonalGaussian(mu, mu, validate_args=True).log_prob(value)


def test_unknown_attributes_raise() -> None:
    for q in (DiagonalGaussian(0.0, 0.0), DiagonalGaussian.from_params(torch.zeros(2), 0)):
        with pytest.raises(AttributeError, match="no attribute 'sigma'"):
            _ = q.sigma


def test_bad_arguments() -> None:
    params = torch.zeros(4, 6)
    q = DiagonalGaussian.from_params(params)
    for call, kind, message in (
        (lambda: DiagonalGaussian.from_params(params[:, :5]), ValueError,
         r"^params has shape \[4, 5\]; want an even size along dimension 1"),
        (lambda: DiagonalGaussian.from_params(params, 2), ValueError, r"^dim is 2; want"),
        (lambda: DiagonalGaussian.from_params(params, -3), ValueError, r"^dim is -3; want"),
        (lambda: DiagonalGaussian.from_params(torch.zeros(6)), ValueError, r"^dim is 1; want"),
        (lambda: DiagonalGaussian.from_params(params.cfloat()), TypeError, r"^params has dtype"),
        (lambda: DiagonalGaussian.from_params("x"), TypeError, r"^params is a str; want a tensor"),
        (lambda: DiagonalGaussian.from_params(params, param="x"), ValueError, r"^param is 'x'"),
        (lambda: DiagonalGaussian.from_params(params, event_ndim=3), ValueError,
         r"^event_ndim is 3; want 0 to 2"),
        (lambda: DiagonalGaussian(params, params[:3]), ValueError, r"^shapes do not broadcast"),
        (lambda: DiagonalGaussian(params, params.cfloat()), TypeError, r"^logvar has dtype"),
        (lambda: DiagonalGaussian(params, params, param="x"), ValueError, r"^param is 'x'"),
        (lambda: DiagonalGaussian(params, params, event_ndim=-1), ValueError, r"^event_ndim is -1"),
        (lambda: q.kl(params), TypeError, r"^prior is a Tensor; want a DiagonalGaussian or None$"),
        (lambda: q.rsample_kl(Normal(0.0, 1.0)), TypeError, r"^prior is a Normal; want"),
        (lambda: q.kl(DiagonalGaussian.from_params(params, event_ndim=0)), ValueError,
         r"^prior has event_ndim 0; want this distribution's, 1$"),
        (lambda: q.rsample(seed=torch.zeros(3, dtype=torch.int64)), ValueError,
         r"^seed has shape \[3\]; want \[\], or \[4\]"),
        (lambda: q.rsample_kl(seed=1, generator=torch.Generator()), ValueError,
         r"^seed and generator are both given"),
        (lambda: q.rsample((-1,)), ValueError, r"^sample_shape is \[-1\]"),
        (lambda: q.log_prob(torch.zeros(3, 3)), ValueError, r"^shapes do not broadcast: x"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()
