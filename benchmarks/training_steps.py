"""Whole training steps, fused against eager: python benchmarks/training_steps.py

A step is forward, backward and Adam. The models differ in nothing but the ops: fastvae's, or the
formulas that users write (`fastvae.bench.formulas.Formulas`). Both are timed as they are, under
`torch.compile` with the ops inside and, on CUDA, in the graphs of its `mode="reduce-overhead"`. All
start from the same weights and take turns, round by round. The ops' share is the time of their
calls alone, forward and backward, on a step's tensors, against the step.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn import functional as F

import fastvae
from fastvae import DiagonalGaussian
from fastvae.bench import machine
from fastvae.bench.formulas import Formulas
from fastvae.bench.measure import Spread

SIGMA = 0.5
MODES = {None: "compiled", "reduce-overhead": "CUDA graphs"}  # of torch.compile


# ---- The ops -------------------------------------------------------------------------------------


class Fused:
    """As README recommends them."""

    def rsample_kl(self, q: Tensor, p: Tensor | None = None) -> tuple[Tensor, Tensor]:
        prior = None if p is None else DiagonalGaussian.from_params(p)
        return DiagonalGaussian.from_params(q).rsample_kl(prior)

    def log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        return fastvae.gaussian_log_prob(x, mean, SIGMA, param="std")

    def counts_loss(self, x: Tensor, mean: Tensor, theta: Tensor, zero_logits: Tensor) -> Tensor:
        return fastvae.zero_inflated_negative_binomial_nll_loss(x, mean, theta, zero_logits)


class Eager:
    """As users write them."""

    formulas = Formulas(torch, torch.randn_like)

    def rsample_kl(self, q: Tensor, p: Tensor | None = None) -> tuple[Tensor, Tensor]:
        prior = () if p is None else p.chunk(2, dim=1)
        return self.formulas.rsample_kl(*q.chunk(2, dim=1), *prior)

    def log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        return self.formulas.gaussian_log_prob(x, mean)

    def counts_loss(self, x: Tensor, mean: Tensor, theta: Tensor, zero_logits: Tensor) -> Tensor:
        loss: Tensor = self.formulas.zero_inflated_negative_binomial_nll_loss(
            x, mean, theta, zero_logits
        )
        return loss


@dataclass
class Recorder:
    """Calls the ops of another, and remembers with what."""

    ops: Any
    calls: list[tuple[str, tuple[Tensor, ...]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            self.calls.append((name, tensors))
            return getattr(self.ops, name)(*tensors)

        return call


# ---- The models ----------------------------------------------------------------------------------


class Network(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:  # torch.compile looks into no code of PyTorch's alone
        return super().forward(x)


class PlainVAE(nn.Module):
    """One latent between an encoder and a decoder."""

    def __init__(self, ops: Any, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.ops, self.encoder, self.decoder = ops, encoder, decoder

    def regions(self) -> list[nn.Module]:
        """What is compiled, each by itself."""
        return [self]

    def forward(self, x: Tensor) -> Tensor:
        z, kl = self.ops.rsample_kl(self.encoder(x))
        return (kl - self.ops.log_prob(x, self.decoder(z))).mean()


def mlp_vae(ops: Any) -> tuple[nn.Module, Tensor]:
    """Kingma & Welling 2014: MNIST, 400 hidden units, 20 latents; batch 128."""
    encoder = Network(nn.Linear(784, 400), nn.Tanh(), nn.Linear(400, 2 * 20))
    decoder = Network(nn.Linear(20, 400), nn.Tanh(), nn.Linear(400, 784))
    return PlainVAE(ops, encoder, decoder), torch.rand(128, 784)


def conv_vae(ops: Any) -> tuple[nn.Module, Tensor]:
    """Higgins et al. 2017: 64x64 faces, four convolutions, 32 latents; batch 64."""
    widths = (3, 32, 32, 64, 64)
    down, up = [], []
    for before, after in itertools.pairwise(widths):
        down += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
        up = [nn.ReLU(), nn.ConvTranspose2d(after, before, 4, 2, 1), *up]
    encoder = Network(*down, nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 2 * 32))
    decoder = Network(
        nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 1024), nn.Unflatten(1, (64, 4, 4)), *up
    )
    return PlainVAE(ops, encoder, decoder), torch.rand(64, 3, 64, 64)


class Bottleneck(Network):
    def __init__(self, before: int, middle: int, after: int, kernel: int) -> None:
        layers: list[nn.Module] = []
        sizes = ((before, middle, 1), (middle, middle, kernel), (middle, middle, kernel))
        for source, target, size in (*sizes, (middle, after, 1)):
            layers += [nn.GELU(), nn.Conv2d(source, target, size, padding=size // 2)]
        super().__init__(*layers)


class Level(nn.Module):
    """One stochastic layer: posterior and prior conditioned on what lies above."""

    def __init__(self, ops: Any, resolution: int, width: int, latent: int) -> None:
        super().__init__()
        self.ops, self.resolution = ops, resolution
        middle, kernel = width // 4, 3 if resolution > 2 else 1
        self.posterior = Bottleneck(2 * width, middle, 2 * latent, kernel)
        self.prior = Bottleneck(width, middle, 2 * latent + width, kernel)
        self.project = nn.Conv2d(latent, width, 1)
        self.residual = Bottleneck(width, middle, width, kernel)
        self.sizes = 2 * latent, width

    def forward(self, h: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        p, h_prior = self.prior(h).split(self.sizes, dim=1)
        q = self.posterior(torch.cat([h, features], dim=1))
        z, kl = self.ops.rsample_kl(q, p)
        h = h + h_prior + self.project(z)
        return h + self.residual(h), kl


class HierarchicalVAE(nn.Module):
    """A top-down VAE with a learned prior in every layer."""

    def __init__(self, ops: Any, levels: dict[int, int], width: int, latent: int) -> None:
        super().__init__()
        self.ops = ops
        self.embed = nn.Conv2d(3, width, 3, padding=1)
        self.encoder = nn.ModuleList(
            Bottleneck(width, width // 4, width, 3 if r > 2 else 1) for r in reversed(levels)
        )
        self.top = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.levels = nn.ModuleList(
            Level(ops, r, width, latent) for r, count in levels.items() for _ in range(count)
        )
        self.output = nn.Conv2d(width, 3, 1)

    def regions(self) -> list[nn.Module]:
        """Level by level: a graph of all 43 takes many minutes to compile."""
        return [*self.levels, *self.encoder]

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        features = {}
        resolutions = sorted({level.resolution for level in self.levels}, reverse=True)
        for resolution, block in zip(resolutions, self.encoder, strict=True):
            h = F.adaptive_avg_pool2d(h, resolution)
            h = features[resolution] = h + block(h)
        h = self.top.expand(len(x), -1, -1, -1)
        kl = x.new_zeros(len(x))
        for level in self.levels:
            if h.shape[-1] != level.resolution:
                h = F.interpolate(h, size=level.resolution)
            h, kl_here = level(h, features[level.resolution])
            kl = kl + kl_here
        return (kl - self.ops.log_prob(x, self.output(h))).mean()


def hierarchical_vae(ops: Any) -> tuple[nn.Module, Tensor]:
    """The 43 levels of Child 2021 for CIFAR-10, 64 channels wide instead of 384; batch 16."""
    levels = {1: 1, 4: 3, 8: 6, 16: 11, 32: 22}
    return HierarchicalVAE(ops, levels, width=64, latent=16), torch.rand(16, 3, 32, 32)


class CountVAE(nn.Module):
    """Zero-inflated counts, whose observed totals a softmax shares out among genes."""

    def __init__(self, ops: Any, genes: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.ops = ops
        self.encoder = Network(*_layer(genes, hidden), nn.Linear(hidden, 2 * latent))
        self.decoder = Network(*_layer(latent, hidden), nn.Linear(hidden, 2 * genes))
        self.log_theta = nn.Parameter(torch.randn(genes))

    def regions(self) -> list[nn.Module]:
        return [self]

    def forward(self, x: Tensor) -> Tensor:
        z, kl = self.ops.rsample_kl(self.encoder(torch.log1p(x)))
        shares, zero_logits = self.decoder(z).chunk(2, dim=1)
        mean = x.sum(1, keepdim=True) * torch.softmax(shares, dim=1)
        return kl.mean() + self.ops.counts_loss(x, mean, self.log_theta.exp(), zero_logits)


def _layer(before: int, after: int) -> list[nn.Module]:
    return [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]


def _count_vae(ops: Any, genes: int) -> tuple[nn.Module, Tensor]:
    rate = torch.exp(torch.randn(genes) - 2 + 0.7 * torch.randn(128, genes))
    return CountVAE(ops, genes, hidden=128, latent=10), torch.poisson(rate)


def count_vae(ops: Any) -> tuple[nn.Module, Tensor]:
    """Lopez et al. 2018: 2,000 genes, 128 hidden units, 10 latents; batch 128."""
    return _count_vae(ops, 2000)


def wide_count_vae(ops: Any) -> tuple[nn.Module, Tensor]:
    """The same with 10,000 genes."""
    return _count_vae(ops, 10_000)


MODELS = {
    "MLP": mlp_vae,
    "convolutional": conv_vae,
    "hierarchical": hierarchical_vae,
    "counts": count_vae,
    "counts-wide": wide_count_vae,
}


# ---- Steps ---------------------------------------------------------------------------------------


def build(
    make: Callable[[Any], tuple[nn.Module, Tensor]], ops: Any, device: str
) -> tuple[nn.Module, Tensor]:
    """The same weights and data for any ops."""
    torch.manual_seed(0)
    model, x = make(ops)
    return model.to(device), x.to(device)


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    return step


def ops_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """The calls of a step's ops, forward and backward, and nothing else."""
    recorder = Recorder(model.ops)
    recorded = copy.deepcopy(model)
    for module in recorded.modules():
        if hasattr(module, "ops"):
            module.ops = recorder
    recorded(x)
    calls = [
        (name, [t.detach().contiguous().requires_grad_(t.requires_grad) for t in tensors])
        for name, tensors in recorder.calls
    ]
    leaves = [t for _, tensors in calls for t in tensors if t.requires_grad]
    upstream: list[Tensor] = []

    def run() -> None:
        results = [getattr(recorder.ops, name)(*tensors) for name, tensors in calls]
        outputs = [y for ys in results for y in (ys if isinstance(ys, tuple) else (ys,))]
        if not upstream:
            upstream.extend(torch.randn_like(y) for y in outputs)
        torch.autograd.grad(outputs, leaves, upstream)

    return run


def check(make: Callable[[Any], tuple[nn.Module, Tensor]], device: str) -> None:
    """Fused loss and gradients are the reference's, with the same noise; the eager loss is near."""
    model, x = build(make, Fused(), device)
    results = []
    for backend in ("native", "reference"):
        torch.manual_seed(1)
        with fastvae.use_backend(backend):
            loss = model(x)
            grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss.item(), torch.cat([g.flatten() for g in grads])))
    (loss, grads), (right, right_grads) = results
    near = build(make, Eager(), device)[0](x).item()  # with other noise
    if abs(loss / right - 1) > 1e-5 or (grads - right_grads).norm() > 1e-3 * right_grads.norm():
        raise SystemExit(f"the fused step computes {loss}, or other gradients; want {right}")
    if abs(near / right - 1) > 0.05:
        raise SystemExit(f"the eager step computes {near}; want about {right}")


def rounds(
    programs: dict[str, Callable[[], None]], count: int, lap: float, device: str
) -> dict[str, list[float]]:
    """Seconds of a call, by program, in turns."""

    def synchronize() -> None:
        if device != "cpu":
            torch.accelerator.synchronize()

    def seconds(run: Callable[[], None], calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, run in programs.items():
        seconds(run, 2)
        calls[name] = max(1, round(lap / seconds(run, 1)))
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(count):
        for name, run in programs.items():
            found[name].append(seconds(run, calls[name]))
    return found


def measure(name: str, arguments: argparse.Namespace) -> None:
    make = MODELS[name]
    check(make, arguments.device)
    steps, ops, compiling = {}, {}, {}
    for kind, implementation in (("fused", Fused()), ("eager", Eager())):
        model, x = build(make, implementation, arguments.device)
        ops[kind] = ops_of(model, x)
        steps[kind] = step_of(model, x)
        for mode, words in MODES.items():
            if not arguments.compile or (mode and arguments.device == "cpu"):
                continue
            model, x = build(make, implementation, arguments.device)
            for module in model.regions():
                module.compile(dynamic=False, fullgraph=True, mode=mode)
            steps[f"{kind}, {words}"] = step = step_of(model, x)
            start = time.perf_counter()
            step()
            compiling[f"{kind}, {words}"] = time.perf_counter() - start
    programs = {**steps, **{f"{kind} ops": run for kind, run in ops.items()}}
    found = rounds(programs, arguments.rounds, 0.1, arguments.device)

    def ratio(a: str, b: str, form: str = "{:.2f} ({:.2f}–{:.2f})") -> str:
        spread = Spread.of([x / y for x, y in zip(found[a], found[b], strict=True)])
        return form.format(spread.median, spread.low, spread.high)

    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{name}: {make.__doc__} {parameters / 1e6:.2f} M parameters")
    for kind in steps:
        text = f"  {kind:<19}{1e3 * Spread.of(found[kind]).median:9.2f} ms"
        if kind != "fused":
            text += f", {ratio(kind, 'fused')} times fused"
        if kind in ops:
            text += f"; the ops alone are {ratio(f'{kind} ops', kind, '{:.1%}')} of it"
        else:
            text += f"; its first took {compiling[kind]:.0f} s"
        print(text)
    print(f"  eager ops take {ratio('eager ops', 'fused ops')} times the fused ops", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args(argv)
    description = machine.describe(arguments.device)
    where = f"{description['cpu']}, {description['cpu_capability']}, {arguments.threads} threads"
    print(
        f"{description.get('gpu', where)}, torch {description['torch']}, float32; "
        f"median (quartiles) of {arguments.rounds} rounds"
    )
    # The levels of a model are one class, of many shapes; and no workers that compute meanwhile.
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.compile_threads = 1
    with machine.use_threads(arguments.threads):
        for name in arguments.models:
            measure(name, arguments)


if __name__ == "__main__":
    main()
