"""Tensors and modules of other kinds: subclasses, meta, fake, pickled, on other devices."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OPS, SEED, Op, op_id
from models import mlp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import fastvae

CPU = torch.device("cpu")
each_op = pytest.mark.parametrize("op", OPS, ids=op_id)


class Tagged(Tensor):
    """A subclass as PyTorch's documentation has it: what is computed from it is of its kind."""


class Recorded(Tensor):
    """A subclass that sees every function that it is given to."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Recorded.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@each_op
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_subclasses_stay_what_they_are(op: Op, backend: str, device: torch.device) -> None:
    tensors = op.inputs((3, 4), device=device)
    with fastvae.use_backend(backend):
        right = op(fastvae, tensors)
        found = op(fastvae, [t.as_subclass(Tagged) for t in tensors])
        leaves = [t.clone().as_subclass(Tagged).requires_grad_() for t in tensors]
        recorded = op(fastvae, leaves)
        grads = torch.autograd.grad(sum(y.sum() for y in recorded), leaves)
    for y, value in zip([*found, *recorded], [*right, *right], strict=True):
        assert type(y) is Tagged
        assert torch.equal(y.detach().as_subclass(Tensor), value)
    assert all(g.shape == t.shape for g, t in zip(grads, tensors, strict=True))


PUBLIC = [getattr(fastvae, name) for name in {op.function for op in OPS}]


class Doubled(Tensor):
    """A subclass that has its own idea of the ops of fastvae."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = super().__torch_function__(func, types, args, kwargs or {})
        if func not in PUBLIC:
            return results
        return tuple(2 * y for y in results) if isinstance(results, tuple | list) else 2 * results


class Watch(TorchFunctionMode):
    """A mode that sees every function."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@each_op
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_torch_function_is_honoured(op: Op, grad: bool, device: torch.device) -> None:
    tensors = [t.requires_grad_(grad) for t in op.inputs((3, 4), device=device)]
    right = op(fastvae, tensors)
    function = getattr(fastvae, op.function)

    Recorded.seen = []
    op(fastvae, [t.detach().as_subclass(Recorded).requires_grad_(grad) for t in tensors])
    assert function in Recorded.seen

    doubled = op(fastvae, [t.detach().as_subclass(Doubled).requires_grad_(grad) for t in tensors])
    for y, value in zip(doubled, right, strict=True):
        assert torch.equal(y.detach().as_subclass(Tensor), 2 * value)

    with Watch() as mode:
        found = op(fastvae, tensors)
    assert mode.seen[0] is function  # before anything else
    assert all(torch.equal(y, value) for y, value in zip(found, right, strict=True))


def test_a_class_like_a_tensor_is_refused_by_name() -> None:
    class Like:
        """What PyTorch's own functions would hand themselves over to."""

        @classmethod
        def __torch_function__(cls, *_: Any) -> Any:
            raise AssertionError

    with pytest.raises(TypeError, match="logvar is a Like; want a tensor or a number"):
        fastvae.rsample(torch.zeros(3), Like())


class Wrapped(Tensor):
    """A subclass that holds another tensor, as pyro's ProvenanceTensor does."""

    raw: Tensor

    @classmethod
    def wrap(cls, raw: Tensor) -> Wrapped:
        wrapped = raw.detach().as_subclass(cls)
        wrapped.raw = raw
        return wrapped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrapped(value: Any) -> Any:
            return value.raw if isinstance(value, Wrapped) else value

        kwargs = {name: unwrapped(value) for name, value in (kwargs or {}).items()}
        result = func(*map(unwrapped, args), **kwargs)
        if type(result) is tuple:
            return tuple(map(cls.wrap, result))
        return cls.wrap(result) if isinstance(result, Tensor) else result


@each_op
def test_what_wraps_a_tensor_keeps_its_gradient(op: Op, device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in op.inputs((3, 4), device=device)]
    right = torch.autograd.grad(sum(y.sum() for y in op(fastvae, leaves)), leaves)
    for k in range(len(leaves)):  # one of them wrapped, by position or by keyword
        mixed = [Wrapped.wrap(t) if i == k else t for i, t in enumerate(leaves)]
        for given in (mixed, mixed[:1]):
            named = dict(zip(op.arguments[len(given) :], mixed[len(given) :], strict=True))
            options = dict(named, **op.options, **({"seed": SEED} if op.draws else {}))
            found = getattr(fastvae, op.function)(*given, **options)
            outputs = found if isinstance(found, tuple) else (found,)
            assert all(isinstance(y, Wrapped) for y in outputs)
            total = sum(y.raw.sum() for y in outputs)
            grads = torch.autograd.grad(total, leaves)
            assert all(torch.equal(g, want) for g, want in zip(grads, right, strict=True))


def test_methods_of_a_distribution_of_what_wraps_a_tensor() -> None:
    mu, logvar = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    params = torch.randn(3, 8, requires_grad=True)
    value = torch.randn(3, 4)
    gaussians = (
        ((mu, logvar), fastvae.DiagonalGaussian(Wrapped.wrap(mu), Wrapped.wrap(logvar))),
        ((params,), fastvae.DiagonalGaussian.from_params(Wrapped.wrap(params))),
    )
    calls = {
        "rsample": lambda q: q.rsample(),
        "samples": lambda q: q.rsample((2,)),
        "kl": lambda q: q.kl(),
        "rsample_kl": lambda q: q.rsample_kl()[1],
        "log_ratio": lambda q: q.rsample_log_ratio()[1],
        "log_prob": lambda q: q.log_prob(value),
        "entropy": lambda q: q.entropy(),
    }
    for leaves, q in gaussians:
        for name, call in calls.items():
            y = call(q)
            assert isinstance(y, Wrapped), name
            assert y.raw.requires_grad, name
            grads = torch.autograd.grad(y.raw.sum(), leaves, allow_unused=True)
            assert any(g is not None and g.any() for g in grads), name


LOSSES = [name for name in fastvae.__all__ if name.endswith("_nll_loss")]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_ask_subclasses_and_modes_first(name: str) -> None:
    class Seen(TorchFunctionMode):
        first: Any = None

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.first = self.first or func
            return func(*args, **(kwargs or {}))

    loss = getattr(fastvae, name)
    shapes = [(3, 4)] + [(3, 4, 2)] * 3 if "mixture" in name else [(3, 4)] * 2
    shapes += [(3, 4)] * (("negative_binomial" in name) + ("zero_inflated" in name))
    x, *others = (torch.rand(shape).requires_grad_() for shape in shapes)
    if name.startswith("categorical"):
        x, others = torch.zeros(3, dtype=torch.int64), [torch.randn(3, 5, requires_grad=True)]
    options = {}
    if name.startswith("colour"):
        x, others = torch.zeros(2, 1, 5), [torch.randn(2, 6, 5, requires_grad=True)]
        options = {"components": 2}
    right = loss(x, *others, **options)
    with Seen() as mode:
        assert torch.equal(loss(x, *others, **options), right)
    assert mode.first is loss
    found = loss(x, *map(Wrapped.wrap, others), **options)
    assert isinstance(found, Wrapped)
    found.raw.backward()
    assert all(t.grad is not None for t in others)


@each_op
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_meta_and_fake_tensors(op: Op, grad: bool, device: torch.device) -> None:
    """Shapes and dtypes of what would be computed, in 10 terabytes."""
    small = op(fastvae, op.inputs((3, 4), torch.bfloat16, device=device))

    def check(tensors: list[Tensor]) -> None:
        leaves = [t.detach().requires_grad_(grad) for t in tensors]
        outputs = op(fastvae, leaves, seed=None)
        assert [y.dtype for y in outputs] == [y.dtype for y in small]
        assert [y.dim() for y in outputs] == [y.dim() for y in small]
        if grad:
            grads = torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])
            assert [g.shape for g in grads] == [t.shape for t in tensors]

    scale = op.scale_shape((1 << 21, 1 << 21))
    big = [
        torch.empty(
            tuple(scale) if name in ("logvar", "log_scale") else (1 << 21, 1 << 21),
            dtype=torch.bfloat16,
            device="meta",
        )
        for name in op.arguments
    ]
    if op.function != "rsample" or not op.options:
        with FakeTensorMode():
            check([torch.empty(t.shape, dtype=t.dtype, device=device) for t in big])
    check([torch.empty((3, 4), dtype=torch.bfloat16, device="meta") for _ in op.arguments])


def test_numbers_beside_meta_tensors() -> None:
    mu = torch.empty(3, 4, device="meta")
    assert fastvae.kl_divergence(mu, 0.5).shape == (3,)
    z, kl = fastvae.rsample_kl(mu, mu, 0.0, 0.0)
    assert z.is_meta
    assert z.shape == (3, 4)
    assert kl.shape == (3,)


def test_modules_can_be_made_on_meta(device: torch.device) -> None:
    with torch.device("meta"):
        model, _ = mlp(torch.device("meta"))
    assert all(p.is_meta for p in model.parameters())
    right, x = mlp(device)
    model = model.to_empty(device=device)
    model.load_state_dict(right.state_dict())
    assert torch.equal(model(x, seed=1).loss, right(x, seed=1).loss)


def test_a_device_context_is_no_obstacle(device: torch.device) -> None:
    x = torch.zeros(3, 4, device=device)
    right = fastvae.rsample(x, 0.0, seed=3)
    with torch.device("meta"):  # where new tensors go, but not those that follow x
        assert torch.equal(fastvae.rsample(x, 0.0, seed=3), right)
        assert fastvae.rsample(x, 0.0).device == x.device


# ---- Kept and copied -----------------------------------------------------------------------------

MODULES = {
    "VAE": lambda: mlp(CPU)[0],
    "IWAE": lambda: mlp(CPU, objective=fastvae.IWAE(3))[0],
    "DReG": lambda: mlp(CPU, objective=fastvae.DReG(3))[0],
    "sticking the landing": lambda: mlp(CPU, objective=fastvae.StickingTheLanding(2))[0],
    "free bits": lambda: mlp(CPU, objective=fastvae.ELBO(fastvae.FreeBits(0.1)))[0],
    "capacity": lambda: mlp(CPU, objective=fastvae.ELBO(fastvae.Capacity(2.0)))[0],
    "learned sigma": lambda: mlp(CPU, likelihood=fastvae.LearnedGaussian())[0],
    "optimal sigma": lambda: mlp(CPU, likelihood=fastvae.OptimalGaussian())[0],
    "decoded sigma": lambda: mlp(CPU, likelihood=fastvae.HeteroscedasticGaussian(), outputs=2)[0],
    "Bernoulli": lambda: mlp(CPU, likelihood=fastvae.Bernoulli())[0],
    "continuous Bernoulli": lambda: mlp(CPU, likelihood=fastvae.ContinuousBernoulli())[0],
    "Laplace": lambda: mlp(CPU, likelihood=fastvae.Laplace(0.5))[0],
    "logistic": lambda: mlp(CPU, likelihood=fastvae.DiscretizedLogistic(), outputs=2)[0],
    "learned prior": lambda: mlp(CPU, prior=fastvae.LearnedGaussianPrior(3))[0],
    "mixture": lambda: mlp(CPU, prior=fastvae.MixturePrior(4, 3))[0],
    "Cholesky": lambda: mlp(CPU, params=9, posterior=fastvae.CholeskyGaussian.from_params)[0],
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_pickle_deepcopy_and_state_dict(make: Any) -> None:
    model, x = make().double(), mlp(CPU)[1]
    right = model(x, seed=3).loss
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(x, seed=3).loss, right)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = make().double()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x, seed=3).loss, right)


def test_the_package_says_that_it_is_typed() -> None:
    from importlib.resources import files

    assert files("fastvae").joinpath("py.typed").is_file()


def test_pickles_of_version_0_1_load() -> None:
    """Made by that version: models, a distribution, a bound, functions, and what they computed."""
    content = pickle.loads((Path(__file__).parent / "pickles_0_1.pkl").read_bytes())
    for name, model in content["models"].items():
        loss = model(content["x"], seed=3).loss
        torch.testing.assert_close(loss, content["losses"][name], rtol=1e-6, atol=0)
    assert isinstance(content["q"], fastvae.DiagonalGaussian)
    assert content["bound"] == fastvae.Bound(-1, 2, "soft")
    assert content["function"] is fastvae.rsample_kl
    assert content["log_prob"] is fastvae.laplace_log_prob


# ---- In other frameworks -------------------------------------------------------------------------


def test_a_lightning_module() -> None:
    lightning = pytest.importorskip("lightning")
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        """The whole of it: a VAE is a module whose output has the loss."""

        def __init__(self) -> None:
            super().__init__()
            encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
            decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 6))
            self.vae = fastvae.VAE(encoder, decoder, latent_shape=2)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            output = self.vae(batch[0])
            self.log_dict({"rate": output.kl.mean(), "elbo": output.bound.mean()})
            return output.loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    lightning.seed_everything(0, verbose=False)
    x = torch.randn(64, 1) * torch.randn(6)
    module = Module()
    with torch.no_grad():
        before = module.vae(x, seed=0).loss
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=16))
    with torch.no_grad():
        assert module.vae(x, seed=0).loss < before - 0.5
    assert trainer.callback_metrics["rate"] > 0


def test_scvi_asks_for_divergences() -> None:
    """What scvi-tools' modules compute of a posterior that a user puts into them."""
    q = fastvae.DiagonalGaussian(*torch.randn(2, 5, 3), event_ndim=0)
    p = torch.distributions.Normal(torch.zeros(5, 3), torch.ones(5, 3))
    found = torch.distributions.kl_divergence(q, p).sum(dim=-1)
    torch.testing.assert_close(found, fastvae.kl_divergence(q.mu, q.logvar))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_pyro_distribution(kind: str) -> None:
    """With pyro's mixin: a guide's site, whose KL TraceMeanField_ELBO finds instead of sampling."""
    pyro = pytest.importorskip("pyro")
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    class Diagonal(fastvae.DiagonalGaussian, TorchDistributionMixin):
        pass

    class Full(fastvae.CholeskyGaussian, TorchDistributionMixin):
        pass

    loc = torch.randn(4, 3)

    def posterior() -> Any:
        if kind == "full":
            return Full(loc[:1], 0.5 * torch.eye(3))
        return Diagonal(loc[:1], 0.5, param="std")

    def guide() -> None:
        with pyro.plate("batch", 4):
            pyro.sample("z", posterior())

    prior = pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1)

    def model() -> None:
        with pyro.plate("batch", 4):
            pyro.sample("z", prior)

    q = posterior()
    assert type(q.expand((4,))) is type(q)
    assert type(q.expand_by((2,))) is type(q)
    assert q.shape() == (1, 3)
    assert q.mask(torch.tensor(True)).log_prob(loc[:1]).shape == (1,)
    assert q.to_event(1).event_shape == (1, 3)
    elbo = pyro.infer.TraceMeanField_ELBO()
    losses = [elbo.loss(model, guide) for _ in range(3)]
    right = torch.distributions.MultivariateNormal(loc[:1].expand(4, 3), 0.25 * torch.eye(3))
    standard = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    want = torch.distributions.kl_divergence(right, standard).sum().item()
    assert losses == pytest.approx([want] * 3, rel=1e-5)  # no noise in it
    sampled = {pyro.infer.Trace_ELBO().loss(model, guide) for _ in range(3)}
    assert len(sampled) == 3
