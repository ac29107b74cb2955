"""torch.compile and torch.export: one graph, the numbers of eager code, no storm of recompiles."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accuracy import upstream_like
from cases import FORMS, OPS, Op, op_id
from functorch.compile import make_boxed_func
from models import mlp
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.testing import assert_close

import fastvae

RSAMPLE_KL = next(op for op in OPS if op.name == "rsample_kl to N(0, I)")
each_op = pytest.mark.parametrize("op", OPS, ids=op_id)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def forward_and_backward(function, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, from PyTorch's own generator."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.manual_seed(11)
    outputs = function(leaves)
    upstream = upstream_like([y.detach() for y in outputs])
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def drawn_by_pytorch(op: Op, param: str = "logvar"):
    return lambda tensors: op(fastvae, tensors, param, seed=None)


@each_op
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_ops_give_the_numbers_of_eager_ones(
    op: Op, dynamic: bool, device: torch.device
) -> None:
    eager = drawn_by_pytorch(op)
    compiled = torch.compile(eager, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((4, 6), (5, 7)):
        tensors = op.inputs(shape, device=device)
        right = forward_and_backward(eager, tensors)
        for y, value in zip(forward_and_backward(compiled, tensors), right, strict=True):
            assert_close(y, value, rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)
    assert not counters["graph_break"]


@each_op
def test_compiled_without_gradients(op: Op, device: torch.device) -> None:
    eager = drawn_by_pytorch(op)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    tensors = op.inputs((4, 6), device=device)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.manual_seed(3)
            right = eager(tensors)
            torch.manual_seed(3)
            assert all(
                torch.equal(y, value) for y, value in zip(compiled(tensors), right, strict=True)
            )


@pytest.mark.parametrize("param", FORMS)
def test_compiled_ops_keep_the_fused_kernels(param: str) -> None:
    """The graph holds the ops themselves, forward and backward, not their formulas."""
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]):
        graphs.append(graph.code)
        return make_boxed_func(graph)

    def step(mu: Tensor, scale: Tensor) -> Tensor:
        z, kl = RSAMPLE_KL(fastvae, (mu, scale), param)
        return (fastvae.gaussian_log_prob(z, mu) - kl).sum()

    leaves = [t.requires_grad_() for t in RSAMPLE_KL.inputs((4, 6), param=param)]
    torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(
        *leaves
    ).backward()
    forward, backward = graphs
    assert "fastvae.rsample_kl.default" in forward
    assert "fastvae.gaussian_log_prob.default" in forward
    assert "fastvae.rsample_kl_backward.default" in backward
    assert "fastvae.gaussian_log_prob_backward.default" in backward
    assert "aten.exp." not in forward + backward


def test_changing_batches_recompile_once(device: torch.device) -> None:
    """The default: a second size makes the graph dynamic, and no later one compiles anything."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(params: Tensor) -> Tensor:
        z, kl = fastvae.DiagonalGaussian.from_params(params).rsample_kl()
        return (kl - fastvae.gaussian_log_prob(z, 0.0, 0.1, param="std")).mean()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for batch in (4, 5, 7, 9, 33, 128):
        params = torch.randn(batch, 6, device=device, requires_grad=True)
        torch.manual_seed(1)
        right = torch.autograd.grad(step(params), params)
        torch.manual_seed(1)
        assert_close(torch.autograd.grad(compiled(params), params), right)
    assert counter.frame_count == 2


@needs_compiler
def test_a_compiled_training_step(device: torch.device) -> None:
    """Through Inductor: a whole VAE, its loss and all gradients."""
    model, x = mlp(device)
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for function in (model, compiled):
        model.zero_grad()
        torch.manual_seed(5)
        loss = function(x).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for y, value in zip(results[1], results[0], strict=True):
        assert_close(y, value, rtol=1e-5, atol=1e-5)
    # Another draw: the noise is no constant of the graph.
    with torch.no_grad():
        assert not torch.equal(compiled(x).z, compiled(x).z)


@pytest.mark.parametrize("function", ["rsample", "rsample_kl"])
def test_a_generator_breaks_the_graph_or_is_refused(function: str) -> None:
    """As with PyTorch's own ops, no graph holds a generator; but the error says what to do."""
    mu = torch.zeros(4, 3)

    def draw(generator: torch.Generator) -> Tensor:
        return torch.cat(
            [y.flatten() for y in getattr(fastvae, function)(mu, mu, generator=generator)]
        )

    right = draw(torch.Generator().manual_seed(1))
    compiled = torch.compile(draw, backend="aot_eager")
    assert torch.equal(compiled(torch.Generator().manual_seed(1)), right)
    torch._dynamo.reset()
    whole = torch.compile(draw, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="generator= cannot be compiled; want seed="
    ):
        whole(torch.Generator().manual_seed(1))


# ---- Export --------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """An encoder with sampling and KL divergence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 6)

    def forward(self, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return fastvae.DiagonalGaussian.from_params(self.net(x)).rsample_kl(seed=seed)


def exported(encoder: nn.Module, *, strict: bool = False) -> torch.export.ExportedProgram:
    x, seed = torch.rand(4, 12), torch.tensor(3)
    batch = torch.export.Dim("batch", min=1, max=4096)
    return torch.export.export(encoder, (x, seed), dynamic_shapes=({0: batch}, None), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_export_save_load(strict: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    torch.export.save(exported(encoder, strict=strict), tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    for batch in (1, 4, 9):
        x, seed = torch.rand(batch, 12), torch.tensor(batch)
        for y, value in zip(loaded(x, seed), encoder(x, seed), strict=True):
            assert torch.equal(y, value)


def test_export_of_drawn_noise() -> None:
    """Without a seed, the exported program draws from PyTorch's generator in every call."""

    class Drawing(Encoder):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return fastvae.DiagonalGaussian.from_params(self.net(x)).rsample_kl()

    encoder, x = Drawing(), torch.rand(4, 12)
    program = torch.export.export(encoder, (x,)).module()
    torch.manual_seed(2)
    right = [encoder(x)[0], encoder(x)[0]]
    torch.manual_seed(2)
    assert all(torch.equal(program(x)[0], z) for z in right)


@needs_compiler
def test_ahead_of_time_compilation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            exported(encoder), package_path=str(tmp_path / "encoder.pt2")
        )
        compiled = torch._inductor.aoti_load_package(package)
        for batch in (2, 4, 9):
            x, seed = torch.rand(batch, 12), torch.tensor(batch)
            for y, value in zip(compiled(x, seed), encoder(x, seed), strict=True):
                assert_close(y, value)


@pytest.mark.parametrize("function", ["gaussian_log_prob", "gaussian_nll_loss"])
def test_a_scale_that_changes_is_not_compiled_anew(function: str) -> None:
    """PyTorch makes a number that differs in the second call a variable, if nobody wants it
    constant."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    x, mean = torch.randn(2, 4, 6).unbind()
    loss = getattr(fastvae, function)

    @torch.compile(backend=counter)
    def step(mean: Tensor, sigma: float) -> Tensor:
        return loss(x, mean, sigma, param="std").sum()

    for sigma in (0.1, 0.2, 0.3, 0.4, 0.5):
        torch.testing.assert_close(step(mean, sigma), loss(x, mean, sigma, param="std").sum())
    assert counter.frame_count == 2
