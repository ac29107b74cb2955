"""Two processes that train one model, by DistributedDataParallel, and draw what one process draws.

    torchrun --nproc-per-node 2 examples/two_processes.py

With one seed for each row (`fastvae.draw_seed(batch=...)`) an example's noise does not depend on
which process computes it. So the curve of two processes is that of one, which rank 0 trains for
comparison afterwards.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastvae

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
args = parser.parse_args()

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, ranks = dist.get_rank(), dist.get_world_size()

digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16
digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))]
train, held_out = digits[197:], digits[:197]  # batches of 64 are 25 whole ones, halves of 32


def trained(rank: int, ranks: int) -> list[float]:
    """The held-out ELBO after each epoch. This process computes every `ranks`-th row of a batch."""
    torch.manual_seed(0)  # every process draws the same weights, orders and seeds
    model = fastvae.VAE(
        nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * 8)),
        nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 64)),
        latent_shape=8,
        likelihood=fastvae.Gaussian(sigma=0.2),
    )
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for epoch in range(args.epochs):
        for x in train[torch.randperm(len(train))].split(64):
            seeds = fastvae.draw_seed(batch=len(x))
            loss = wrapped(x[rank::ranks], seed=seeds[rank::ranks]).loss
            optimizer.zero_grad()
            loss.backward()  # gradients are averaged over the processes
            optimizer.step()
        with torch.no_grad():
            history.append(model(held_out, seed=epoch).bound.mean().item())
        if rank == 0 and epoch % 5 == 0:
            print(f"epoch {epoch + 1}: held-out ELBO {history[-1]:.2f} nats", flush=True)
    return history


together = trained(rank, ranks)
if rank == 0:
    alone = trained(0, 1)
    epochs = range(1, args.epochs + 1)
    apart = (torch.tensor(together) - torch.tensor(alone)).abs()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(epochs, alone, lw=5, color="lightgrey", label="one process")
    left.plot(epochs, together, "--", color="black", label=f"{ranks} processes")
    left.set(xlabel="epoch", ylabel="held-out ELBO, nats")
    left.legend()
    right.semilogy(epochs, apart.clamp(min=1e-7), color="black")
    right.set(xlabel="epoch", ylabel="difference, nats", ylim=(1e-7, 10))
    picture = args.out / "two_processes.png"
    figure.savefig(picture, dpi=100)
    print(f"largest difference from one process: {apart.max():.1e} nats")
    print(f"held-out ELBO {together[0]:.2f} -> {together[-1]:.2f} nats, in {picture}")
dist.destroy_process_group()
