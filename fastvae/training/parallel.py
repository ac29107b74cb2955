"""The processes of one training run: those that torchrun started, or just this one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

__all__ = [
    "add_gradients",
    "add_up",
    "agreed",
    "joined",
    "local_device",
    "own_rows",
    "rank",
    "size",
]

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Connects the processes that torchrun started; alone, does nothing."""
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first one writes files and talks."""
    return dist.get_rank() if size() > 1 else 0


def local_device() -> torch.device:
    """The GPU of this process if there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if size() > 1 else "cuda")


def agreed(value: T) -> T:
    """What the first process says `value` is."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def own_rows(batch: Tensor) -> Tensor:
    """This process's share of a batch, empty if there are more processes than rows."""
    return batch.tensor_split(size())[rank()]


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def add_gradients(parameters: Sequence[Parameter]) -> None:
    """Gives every parameter the sum of all processes' gradients."""
    if size() == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = add_up(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        assert p.grad is not None
        p.grad.copy_(grad.view_as(p))
