"""Threads and processes: calls at once, workers, forks; and the lock that they share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accuracy import gradients, same_bits
from cases import OPS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastvae

ROOT = Path(__file__).parents[1]


def test_calls_from_several_threads(device: torch.device) -> None:
    """Every thread gets the numbers that it gets alone."""
    jobs = [
        (op, op.inputs(shape, device=device, seed=k))
        for k in range(4)
        for op in OPS
        for shape in ((64, 40), (3, 20000))
    ]

    def run(job: tuple) -> list[Tensor]:
        op, tensors = job
        return [*op(fastvae, tensors), *gradients(op, tensors)[0]]

    right = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for found, values in zip(pool.map(run, jobs), right, strict=True):
            assert all(same_bits(y, value) for y, value in zip(found, values, strict=True))


def longest_wait(work) -> float:
    """The longest time for which this thread got no turn while another did `work`, as a part of the
    time that it took."""
    span: list[float] = []

    def timed() -> None:
        span.append(time.perf_counter())
        work()
        span.append(time.perf_counter())

    thread = threading.Thread(target=timed)
    ticks = [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        time.sleep(0.0005)
        ticks.append(time.perf_counter())
    thread.join()
    inside = [span[0], *(t for t in ticks if span[0] < t < span[1]), span[1]]
    return max(b - a for a, b in pairwise(inside)) / (span[1] - span[0])


def test_kernels_release_the_interpreter_lock() -> None:
    mu, logvar = torch.zeros(64, 500_000), torch.zeros(64, 500_000)

    def work() -> None:
        fastvae.kl_divergence(mu, logvar)

    def under_the_lock() -> None:
        sorted(numbers)  # one call into C that keeps it

    numbers = torch.randperm(300_000).tolist()
    # A busy machine may take the turn away, but the lock would in every attempt.
    assert min(longest_wait(work) for _ in range(8)) < 0.5
    assert min(longest_wait(under_the_lock) for _ in range(3)) > 0.9  # the negative control


class Noisy(Dataset):
    """Draws in the worker."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return fastvae.rsample(torch.zeros(3, 5000), 0.0, seed=index)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str) -> None:
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} on this system")
    fastvae.rsample(torch.zeros(100, 5000), 0.0)  # the pool of threads exists before the fork
    data = Noisy()
    loader = DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=start, timeout=60
    )
    for k, batch in enumerate(loader):
        assert torch.equal(batch, torch.stack([data[2 * k], data[2 * k + 1]]))


FORKED = """
import os, signal, sys, torch, fastvae

mu, scale, ones = torch.zeros(64, 20000), torch.zeros((), requires_grad=True), torch.ones(64)

def work():  # rows for each thread, then a gradient that is reduced in several slots
    log_prob = fastvae.gaussian_log_prob(mu, 0.0, scale)
    return *fastvae.rsample_kl(mu, mu, seed=1), *torch.autograd.grad(log_prob, scale, ones)

torch.set_num_threads(2)
right = work()
pid = os.fork()
if pid == 0:
    signal.alarm(30)  # ends a child that hangs
    found = work()
    torch.set_num_threads(1)  # PyTorch's own ops would hang
    os._exit(0 if all(map(torch.equal, found, right)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    """OpenMP's threads do not survive: the child computes on one."""
    subprocess.run(
        [sys.executable, "-c", FORKED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
    )
