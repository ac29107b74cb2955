"""A VampPrior beside N(0, I): the prior goes to where the data's codes are.

    python examples/vamp_prior.py

A VampPrior (Tomczak & Welling 2018) is a mixture of the posteriors of learned pseudo-inputs. Its
ln p(z) is one call, `fastvae.mixture_log_prob`, which makes no tensor of examples x components x
dimensions.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import nn

import fastvae

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
args = parser.parse_args()

torch.manual_seed(0)
data = load_digits()
order = torch.randperm(len(data.data))
digits = torch.tensor(data.data, dtype=torch.float32)[order] / 16
labels = data.target[order]
train, held_out = digits[200:], digits[:200]


def trained(components: int) -> tuple[fastvae.VAE, list[float]]:
    """A model with two latents, and its held-out ELBO after each epoch."""
    torch.manual_seed(1)
    model = fastvae.VAE(
        nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * 2)),
        nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 64)),
        latent_shape=2,
        likelihood=fastvae.Gaussian(sigma=0.2),
    )
    if components:
        model.prior = fastvae.VampPrior(model.encode, train[:components])
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


def draw(axes: Axes, model: fastvae.VAE, title: str) -> None:
    """The prior's density, and the codes of the data."""
    with torch.no_grad():
        codes = model.encode(train).mode
        low, high = codes.min(0).values - 1, codes.max(0).values + 1
        unit = torch.linspace(0, 1, 150)
        points = low + (high - low) * torch.cartesian_prod(unit, unit)
        density = model.prior.log_prob(points).reshape(150, 150)
    levels = density.max().item() - torch.arange(6, -0.5, -1)  # nats below the peak
    axes.contourf(*points.T.reshape(2, 150, 150), density, levels, cmap="Greys", alpha=0.6)
    axes.scatter(*codes.T, c=labels[200:], s=2, cmap="tab10")
    axes.set_title(title, fontsize=10)


print("prior N(0, I)")
plain, plain_history = trained(0)
print("VampPrior of 50 pseudo-inputs")
vamp, vamp_history = trained(50)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
draw(left, plain, f"p(z) = N(0, I): ELBO {plain_history[-1]:.1f} nats")
draw(right, vamp, f"VampPrior: ELBO {vamp_history[-1]:.1f} nats")
picture = args.out / "vamp_prior.png"
figure.savefig(picture, dpi=80)

print(f"N(0, I): held-out ELBO {plain_history[0]:.2f} -> {plain_history[-1]:.2f} nats")
print(
    f"VampPrior: held-out ELBO {vamp_history[0]:.2f} -> {vamp_history[-1]:.2f} nats, in {picture}"
)
