"""What only a GPU has: graphs, streams, several devices, tensors beyond 2^31 elements.

Everything else is tested on CUDA by the other files, under `pytest --device cuda`.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import same_bits, upstream_like
from cases import OPS, Op, op_id
from torch import Tensor

import fastvae

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and fastvae.backend.HAS_CUDA), reason="needs a GPU"
)

GIB = 1 << 30
# Few long rows, whose parts meet at counters; many short ones.
SHAPES = ((3, 100003), (4, 65536), (300, 20))


@pytest.fixture(autouse=True)
def only_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")


def inputs(*shape: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mu, logvar = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return mu.requires_grad_(), logvar.requires_grad_()


def step(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    """Sampling, KL and all gradients, one of a scalar."""
    z, kl = fastvae.rsample_kl(mu, logvar)
    scale = logvar[:1, :1].sum()  # one learned number for all
    log_prob = fastvae.gaussian_log_prob(mu.detach(), z, scale)
    grads = torch.autograd.grad((kl.mean() - log_prob.mean(),), (mu, logvar))
    return z.detach(), kl.detach(), log_prob.detach(), *grads


def capture(*arguments: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    side = torch.cuda.Stream(arguments[0].device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what PyTorch sets up at its first call must not be captured
        for _ in range(3):
            step(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*arguments)
    return graph, results


def copies(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone() for t in tensors]


# ---- Graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replays_give_what_eager_calls_give(shape: tuple[int, ...], device: torch.device) -> None:
    arguments = inputs(*shape, device=device)
    graph, results = capture(*arguments)
    torch.manual_seed(3)
    eager = [copies(step(*arguments)) for _ in range(3)]
    torch.manual_seed(3)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(copies(results))
    for e, r in zip(eager, replayed, strict=True):
        assert all(map(same_bits, e, r))
    assert not torch.equal(replayed[0][0], replayed[1][0])  # fresh noise


def test_a_replay_reads_what_its_inputs_hold_then(device: torch.device) -> None:
    mu, logvar = inputs(4, 65536, device=device)
    graph, results = capture(mu, logvar)
    with torch.no_grad():
        mu.mul_(2)
    graph.replay()
    assert same_bits(results[1], fastvae.rsample_kl(mu, logvar)[1].detach())


def test_graphs_replayed_at_once_do_not_meet(device: torch.device) -> None:
    """Each has counters and partial sums of its own."""
    arguments = [inputs(3, 500000 + 4 * k, device=device) for k in range(3)]
    captured = [capture(*a) for a in arguments]
    right = []
    for graph, results in captured:
        graph.replay()
        right.append(results[1].clone())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in captured]
    for _ in range(20):
        for stream, (graph, _) in zip(streams, captured, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for kl, (_, results) in zip(right, captured, strict=True):
        assert same_bits(kl, results[1])


# ---- Streams -------------------------------------------------------------------------------------


def test_a_side_stream_is_honoured(device: torch.device) -> None:
    mu = torch.zeros(4, 65536, device=device)
    logvar = torch.zeros_like(mu)
    expected = fastvae.kl_divergence(mu + 1, logvar)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        mu.add_(1)
        kl = fastvae.kl_divergence(mu, logvar)
    early = mu.sum()  # on the first stream, which does not wait for the other
    assert early.item() == 0
    stream.synchronize()
    assert same_bits(kl, expected)


def test_calls_on_several_streams_do_not_meet(device: torch.device) -> None:
    arguments = [inputs(3, 300000 + 4 * k, device=device) for k in range(4)]
    right = [fastvae.kl_divergence(*a) for a in arguments]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in arguments]
    found: list[list[Tensor]] = [[] for _ in arguments]
    for _ in range(20):
        for stream, a, values in zip(streams, arguments, found, strict=True):
            with torch.cuda.stream(stream):
                values.append(fastvae.kl_divergence(*a))
    torch.cuda.synchronize()
    for kl, values in zip(right, found, strict=True):
        assert all(same_bits(kl, value) for value in values)


def test_no_call_waits_for_the_gpu(device: torch.device) -> None:
    arguments = inputs(3, 100003, device=device)
    step(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Devices -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    first, second = (inputs(3, 100003, device=f"cuda:{k}") for k in range(2))
    seeds = [torch.tensor(7, device=t[0].device) for t in (first, second)]
    results = [
        fastvae.rsample_kl(*t, seed=seed) for t, seed in zip((first, second), seeds, strict=True)
    ]
    grads = [
        torch.autograd.grad(r, t, upstream_like([y.detach() for y in r]))
        for r, t in zip(results, (first, second), strict=True)
    ]
    for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert b.device == torch.device("cuda:1")
        assert same_bits(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("op", [op for op in OPS if op.draws], ids=op_id)
def test_noise_has_the_bits_of_the_cpu(op: Op, device: torch.device) -> None:
    for shape in ((37, 20), (3, 1001), (2, 4, 3, 5), (9, 65536)):
        z, *_ = op(fastvae, op.inputs(shape))
        assert same_bits(z, op(fastvae, op.inputs(shape, device=device))[0].cpu())


# ---- Large tensors -------------------------------------------------------------------------------


def need_memory(bytes_: int, device: torch.device) -> None:
    if torch.cuda.mem_get_info(device)[0] < bytes_:
        pytest.skip(f"needs {bytes_ / GIB:.0f} GiB of free memory")


def test_noise_and_gradients_past_two_to_the_31_elements(device: torch.device) -> None:
    need_memory(40 * GIB, device)
    rows, last = (1 << 28) + 48, 40
    seed = torch.arange(rows, device=device)
    seed[-last:] = seed[:last]  # with a seed a row, noise depends on nothing else
    mu = torch.zeros(rows, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert mu.numel() > 1 << 31
    z = fastvae.rsample(mu, 1.0, param="std", seed=seed)
    assert same_bits(z[:last], z[-last:])
    assert not same_bits(z[:last], z[last : 2 * last])
    z[-1].sum().backward()
    assert mu.grad is not None
    assert mu.grad[-1].eq(1).all()
    assert not mu.grad[:-1].any()


def test_sums_past_two_to_the_31_elements(device: torch.device) -> None:
    need_memory(24 * GIB, device)
    mu = torch.ones(1, (1 << 31) + 72, device=device, dtype=torch.bfloat16)
    zero = torch.zeros((), device=device, dtype=torch.bfloat16, requires_grad=True)
    mean = mu[:, :1] * 0
    half = 0.5 * mu.numel()
    log_prob = fastvae.gaussian_log_prob(mu, mean, zero)
    constant = 0.9189385332046727 * mu.numel()
    torch.testing.assert_close(log_prob.item(), -half - constant, rtol=5e-6, atol=0)
    log_prob.sum().backward()  # d/ds: half of every (x - mean)^2 - 1, which is 0
    assert zero.grad is not None
    assert zero.grad.item() == 0
    mu[0, -1] = 1 << 16  # the very last element counts
    kl = fastvae.kl_divergence(mu, zero.detach())
    torch.testing.assert_close(kl.item(), half - 0.5 + 0.5 * (1 << 32), rtol=1e-6, atol=0)


# ---- Thrift --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(), (1 << 20,)], ids=["a scalar", "a row"])
def test_gradients_of_broadcast_operands_take_no_full_size_memory(
    size: tuple[int, ...], device: torch.device
) -> None:
    x = torch.randn(64, 1 << 20, device=device)
    logvar = torch.zeros(size, device=device, requires_grad=True)
    log_prob = fastvae.gaussian_log_prob(x, x, logvar).sum()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    log_prob.backward()
    extra = torch.cuda.max_memory_allocated(device) - before
    assert extra < 0.1 * x.numel() * x.element_size()


def test_one_launch(device: torch.device) -> None:
    """Also where a row's parts meet; then their counters are zeroed before."""
    mu, logvar = (t.detach() for t in inputs(3, 100003, device=device))
    fastvae.kl_divergence(mu, logvar)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fastvae.kl_divergence(mu, logvar)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "loop<" in e.name]
    if not profile.events():
        pytest.skip("the profiler sees no kernels here")
    assert len(kernels) == 1
