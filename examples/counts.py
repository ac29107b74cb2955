"""Counts of cells: a negative binomial, beside the Poisson that it contains.

    python examples/counts.py

The data are simulated: six types of cells, 300 genes, totals that differ, and more variance than a
Poisson has. Counts go in as they are; `library="observed"` takes each cell's total from them.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fastvae

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
args = parser.parse_args()

CELLS, GENES, TYPES = 1500, 300, 6
torch.manual_seed(0)
types = torch.randint(TYPES, (CELLS,))
position = 1.5 * torch.randn(TYPES, 4)[types] + 0.4 * torch.randn(CELLS, 4)
shares = torch.softmax(torch.randn(GENES) + 0.5 * position @ torch.randn(4, GENES), 1)
means = shares * 2000 * torch.exp(0.5 * torch.randn(CELLS, 1))
theta = torch.exp(1 + 0.5 * torch.randn(GENES))  # variance m + m^2 / theta
counts = torch.poisson(means * torch.distributions.Gamma(theta, theta).sample((CELLS,)))
train, held_out = counts[200:], counts[:200]


class Encoder(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.log1p(x))


def trained(likelihood: fastvae.Likelihood) -> tuple[fastvae.VAE, list[float]]:
    """A model, and its held-out ELBO after each epoch."""
    torch.manual_seed(1)
    model = fastvae.VAE(
        Encoder(nn.Linear(GENES, 64), nn.ReLU(), nn.Linear(64, 2 * 8)),
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, GENES)),
        latent_shape=8,
        likelihood=likelihood,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history = []
    for epoch in range(args.epochs):
        for x in train[torch.randperm(len(train))].split(64):
            loss = model(x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            history.append(model(held_out, seed=0).bound.mean().item())
        if epoch % 20 == 0:
            print(f"epoch {epoch + 1}: held-out ELBO {history[-1]:.2f} nats", flush=True)
    return model, history


@torch.no_grad()
def replicated(model: fastvae.VAE) -> Tensor:
    """The same cells drawn again: x ~ p(x | z), with their own totals."""
    decoded = model.decode(model.encode(counts).mode)
    return model.likelihood.sample(decoded, library=counts.sum(1))


print("Poisson")
poisson, poisson_history = trained(fastvae.Poisson(library="observed"))
print("negative binomial")
binomial, history = trained(fastvae.NegativeBinomial(GENES, library="observed"))

with torch.no_grad():
    codes = binomial.encode(counts).mode
    found = torch.exp(binomial.likelihood.log_theta)
plane = (codes - codes.mean(0)) @ torch.linalg.svd(codes - codes.mean(0)).Vh[:2].T

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
left.scatter(*plane.T, c=types, s=3, cmap="tab10")
left.set_title("codes, by type of cell", fontsize=10)
left.set(xlabel="first principal component", ylabel="second")
middle.scatter(theta, found, s=5)
middle.axline((1, 1), (10, 10), color="black", lw=0.7)
middle.set(xscale="log", yscale="log", xlabel="θ of the simulation", ylabel="θ found")
middle.set_title("dispersion of each gene", fontsize=10)
for model, label in ((poisson, "Poisson"), (binomial, "negative binomial")):
    right.scatter(counts.mean(0), replicated(model).var(0) / counts.var(0), s=5, label=label)
right.axhline(1, color="black", lw=0.7)
right.set(xscale="log", ylim=(0, 3), xlabel="mean of the gene's counts")
right.legend(fontsize=8)
right.set_title("variance, model's over data's", fontsize=10)
picture = args.out / "counts.png"
figure.savefig(picture, dpi=90)

print(f"Poisson: held-out ELBO {poisson_history[0]:.2f} -> {poisson_history[-1]:.2f} nats")
print(f"negative binomial: held-out ELBO {history[0]:.2f} -> {history[-1]:.2f} nats, in {picture}")
