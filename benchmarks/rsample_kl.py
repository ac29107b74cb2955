"""Times sampling + KL, fused against eager PyTorch: python benchmarks/rsample_kl.py

Forward reads mu and logvar and writes z; backward reads the gradient of z, mu and logvar and writes
two gradients. Both sides run in turns in one process, on random inputs, after their outputs have
been compared; a figure is the median over rounds, and the ratio's spread is its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastvae

SHAPES = ((128, 20), (1024, 128), (64, 16384), (32, 262144), (8192, 16), (100000, 4))
Op = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """As users write it."""
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1)
    return z, kl


def step(op: Op, inputs: list[Tensor], grads: list[Tensor]) -> None:
    """Forward and backward, into gradients that are there no more."""
    torch.autograd.backward(op(*inputs), grads)
    for tensor in inputs:
        tensor.grad = None


def seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def compare(shape: tuple[int, int], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of eager and of fused forward + backward, round by round."""
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    grads = [torch.randn(shape), torch.randn(shape[0])]
    torch.testing.assert_close(eager(*inputs)[1], fastvae.rsample_kl(*inputs)[1])
    runs = [lambda op=op: step(op, inputs, grads) for op in (eager, fastvae.rsample_kl)]
    repeats = max(1, int(0.01 / max(seconds(runs[0], 3), 1e-6)))
    times = [[seconds(run, repeats) for run in runs] for _ in range(rounds)]
    return [t[0] for t in times], [t[1] for t in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    info = fastvae.info()
    print(
        f"rsample_kl, float32, forward + backward; {info['backend']} backend, "
        f"{info['cpu_capability']}, {arguments.threads} threads, torch {info['torch']}"
    )
    print(f"{'shape':>14}  {'eager us':>9}  {'fused us':>9}  {'ratio':>6}  quartiles")
    for shape in SHAPES:
        eager_times, fused_times = compare(shape, arguments.rounds)
        ratios = [a / b for a, b in zip(eager_times, fused_times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{'x'.join(map(str, shape)):>14}  {1e6 * statistics.median(eager_times):9.1f}  "
            f"{1e6 * statistics.median(fused_times):9.1f}  {middle:6.2f}  {low:.2f}-{high:.2f}"
        )


if __name__ == "__main__":
    main()
