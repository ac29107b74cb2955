"""What two processes must agree on; run by torchrun, from tests/test_distributed.py."""

from __future__ import annotations

import sys
import traceback

import torch
import torch.distributed as dist
from models import mlp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fastvae
import fastvae.distributed

CPU = torch.device("cpu")


def whole_batch() -> tuple[fastvae.VAE, Tensor, Tensor]:
    """A model, a batch of 6 and one seed for each row; the same in every process."""
    model, _ = mlp(CPU)
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(6, 6, dtype=torch.float64, generator=generator)
    return model, x, fastvae.draw_seed(generator, batch=6)


def rows_of_rank(t: Tensor) -> Tensor:
    return t.chunk(dist.get_world_size())[dist.get_rank()]


def check_data_parallel(wrap) -> None:
    """The mean loss and the gradients are those of the whole batch in one process."""
    model, x, seeds = whole_batch()
    right = model(x, seed=seeds).loss
    grads = torch.autograd.grad(right, list(model.parameters()))
    wrapped = wrap(model)
    loss = wrapped(rows_of_rank(x), seed=rows_of_rank(seeds)).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert_close(mean / dist.get_world_size(), right.detach())
    for p, grad in zip(wrapped.parameters(), grads, strict=True):
        found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        assert_close(found, grad)


def ddp() -> None:
    check_data_parallel(DistributedDataParallel)


def fsdp2() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check_data_parallel(lambda model: fully_shard(model, mesh=mesh))


def run_ops(mu: Tensor, logvar: Tensor, prior: Tensor, scale: Tensor, seed: Tensor) -> list[Tensor]:
    z, kl = fastvae.rsample_kl(mu, logvar, prior, scale, seed=seed)
    samples = fastvae.rsample(mu, logvar, sample_shape=(2,), seed=seed)
    log_prob = fastvae.gaussian_log_prob(z, mu, scale)
    more = fastvae.rsample_log_ratio(mu, logvar, prior, scale, sample_shape=(2,), seed=seed)
    binary = fastvae.bernoulli_log_prob(z.detach().sigmoid(), mu + prior)
    levels = fastvae.discretized_logistic_log_prob(z.detach(), mu, scale)
    kl_standard = fastvae.kl_divergence(mu, logvar)
    return [z, kl, samples, log_prob, kl_standard, binary, levels, *more]


def dtensor_check(*, one_seed: bool) -> int:
    """Outputs and gradients are those of one process; the number of communications up to them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    inputs = [tensor(6, 4), tensor(6, 4), tensor(4), tensor(4)]
    seed = torch.tensor(3) if one_seed else torch.arange(6)
    leaves = [t.clone().requires_grad_() for t in inputs]
    right = run_ops(*leaves, seed)
    grads = torch.autograd.grad(sum((y * y).sum() for y in right), leaves)

    placed = [distribute_tensor(t, mesh, [Shard(0)]) for t in inputs[:2]]
    placed += [distribute_tensor(t, mesh, [Replicate()]) for t in inputs[2:]]
    placed = [t.requires_grad_() for t in placed]
    seed = distribute_tensor(seed, mesh, [Replicate() if one_seed else Shard(0)])
    with CommDebugMode() as communication:
        found = run_ops(*placed, seed)
        found_grads = torch.autograd.grad(sum((y * y).sum() for y in found), placed)
    for y, value in zip([*found, *found_grads], [*right, *grads], strict=True):
        assert_close(y.full_tensor(), value)
    if not one_seed:
        assert [y.placements for y in found] == [
            (Shard(0),), (Shard(0),), (Shard(1),), *[(Shard(0),)] * 4, (Shard(1),), (Shard(1),),
        ]  # fmt: skip
    gathers = {str(op): n for op, n in communication.get_comm_counts().items()}
    return sum(n for op, n in gathers.items() if "gather" in op)


def dtensor_without_a_gather() -> None:
    assert dtensor_check(one_seed=False) == 0


def dtensor_with_one_seed() -> None:
    assert dtensor_check(one_seed=True) > 0


def dtensor_log_sums_without_a_gather() -> None:
    """Rows stay where they are; components and their gradients are of all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(2)
    z, logits, x, levels, planes, q, p, mu, logvar, weights = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in (
            *((6, 4), (6, 5), (6, 5), (6, 1, 7), (6, 9, 7), (6, 2, 4), (6, 2, 4)),
            *((3, 4), (3, 4), (3,)),
        )
    )

    def run(z, logits, x, levels, planes, q, p, mu, logvar, weights) -> list[Tensor]:
        return [
            fastvae.mixture_log_prob(z, mu, logvar, weights),
            fastvae.pairwise_log_prob(z, mu, logvar),
            fastvae.multinomial_log_prob(x, logits),
            fastvae.colour_mixture_log_prob(levels, planes, components=3),
            fastvae.balanced_categorical_kl_divergence(q, p),
            fastvae.straight_through_categorical(
                q, seed=seeds if isinstance(q, DTensor) else torch.arange(6)
            ),
        ]

    rows, others = [z, logits, x, levels, planes, q, p], [mu, logvar, weights]
    wanted = [t is not levels for t in (*rows, *others)]
    leaves = [t.clone().requires_grad_(w) for t, w in zip((*rows, *others), wanted, strict=True)]
    right = run(*leaves)
    grads = torch.autograd.grad(
        sum((y * y).sum() for y in right), [t for t in leaves if t.requires_grad]
    )
    placed = [distribute_tensor(t, mesh, [Shard(0)]) for t in rows]
    placed += [distribute_tensor(t, mesh, [Replicate()]) for t in others]
    placed = [t.requires_grad_(w) for t, w in zip(placed, wanted, strict=True)]
    seeds = distribute_tensor(torch.arange(6), mesh, [Shard(0)])
    with CommDebugMode() as communication:
        found = run(*placed)
        found_grads = torch.autograd.grad(
            sum((y * y).sum() for y in found), [t for t in placed if t.requires_grad]
        )
    for y, value in zip([*found, *found_grads], [*right, *grads], strict=True):
        assert_close(y.full_tensor(), value)
    assert [y.placements for y in found] == [(Shard(0),)] * 6
    assert not any("gather" in str(op) for op in communication.get_comm_counts())


def dtensor_classes_are_gathered() -> None:
    """Of one row alone, whose only dimension is that of the classes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, logits = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    placed = [distribute_tensor(t, mesh, [Shard(0)]) for t in (x, logits)]
    for f in (fastvae.multinomial_log_prob, fastvae.balanced_categorical_kl_divergence):
        assert_close(f(*placed).full_tensor(), f(x, logits))


def dtensor_seeds_are_those_of_one_process() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mu = torch.zeros(7, 4)  # not divisible by two
    sharded = distribute_tensor(mu, mesh, [Shard(0)])
    torch.manual_seed(9)
    seeds = fastvae.draw_seed(batch=7)
    torch.manual_seed(9)
    placed = fastvae.distributed.draw_seed(sharded)
    assert torch.equal(placed.full_tensor(), seeds)
    logvar = torch.zeros_like(sharded)
    z = fastvae.rsample(sharded, logvar, seed=placed)
    assert z.placements == (Shard(0),)
    assert torch.equal(z.full_tensor(), fastvae.rsample(mu, 0.0, seed=seeds))


def ranks_draw_apart() -> None:
    """From one base seed, another stream on each rank."""
    z = fastvae.rsample(torch.zeros(4, 5), 0.0, seed=100 + dist.get_rank())
    both = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(both, z)
    assert not torch.isclose(both[0], both[1]).any()


CHECKS = (
    ddp,
    fsdp2,
    dtensor_without_a_gather,
    dtensor_with_one_seed,
    dtensor_log_sums_without_a_gather,
    dtensor_classes_are_gathered,
    dtensor_seeds_are_those_of_one_process,
    ranks_draw_apart,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for check in CHECKS:
        try:
            check()
        except Exception:
            traceback.print_exc()
            verdict = "failed"
        else:
            verdict = "ok"
        sys.stdout.write(f"rank {dist.get_rank()} {check.__name__}: {verdict}\n")
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0)
