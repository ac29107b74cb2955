"""beta-TCVAE: latents that stand for one factor each, on data whose factors are known.

    python examples/total_correlation.py

The data are discs: their place across, their place down and their size are drawn independently.
`fastvae.BetaTC` (Chen et al. 2018) weighs the total correlation of the aggregate posterior alone;
the ELBO beside it has beta = 1.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fastvae

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
args = parser.parse_args()

IMAGES, SIZE, LATENTS = 4000, 16, 6
FACTORS = ("across", "down", "size")
torch.manual_seed(0)
factors = torch.rand(IMAGES, 3)  # in [0, 1]
across, down, size = (factors * torch.tensor([8, 8, 3]) + torch.tensor([4, 4, 1.5])).T
pixels = torch.arange(SIZE) + 0.5
distance = torch.hypot(pixels - across[:, None, None], pixels[:, None] - down[:, None, None])
images = torch.sigmoid(2 * (size[:, None, None] - distance)).flatten(1)
train, held_out = images[400:], images[:400]


def trained(objective: fastvae.ELBO | fastvae.BetaTC) -> tuple[fastvae.VAE, list[float]]:
    """A model, and its held-out ELBO after each epoch."""
    torch.manual_seed(1)
    model = fastvae.VAE(
        nn.Sequential(nn.Linear(SIZE**2, 256), nn.ReLU(), nn.Linear(256, 2 * LATENTS)),
        nn.Sequential(nn.Linear(LATENTS, 256), nn.ReLU(), nn.Linear(256, SIZE**2)),
        latent_shape=LATENTS,
        likelihood=fastvae.Gaussian(sigma=0.3),
        objective=objective,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history = []
    for epoch in range(args.epochs):
        for x in train[torch.randperm(len(train))].split(128):
            loss = model(x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            history.append(model(held_out, seed=0).bound.mean().item())
        if epoch % 10 == 0:
            print(f"epoch {epoch + 1}: held-out ELBO {history[-1]:.2f} nats", flush=True)
    return model, history


@torch.no_grad()
def used(model: fastvae.VAE) -> Tensor:
    """The latents whose codes differ from image to image."""
    return (model.encode(images).mean.var(0) > 0.1).nonzero().flatten()


@torch.no_grad()
def correlations(model: fastvae.VAE) -> Tensor:
    """|correlation| of each factor with each latent in use."""
    codes = model.encode(images).mean[:, used(model)]
    return torch.corrcoef(torch.cat([factors, codes], 1).T)[:3, 3:].abs()


@torch.no_grad()
def traversals(model: fastvae.VAE) -> Tensor:
    """One latent in use at a time, from -2 to 2: [latents, 7, pixels]."""
    rows = []
    for latent in used(model):
        z = torch.zeros(7, LATENTS)
        z[:, latent] = torch.linspace(-2, 2, 7)
        rows.append(model.decode(z))
    return torch.stack(rows)


print("ELBO")
plain, plain_history = trained(fastvae.ELBO())
print("beta-TCVAE")
tc, history = trained(fastvae.BetaTC(len(train), beta=8))

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.5), layout="constrained")
for axes, model, title in ((left, plain, "ELBO"), (middle, tc, "total correlation × 8")):
    found = correlations(model)
    shown = axes.imshow(found, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xticks=range(found.shape[1]), yticks=range(3), yticklabels=FACTORS)
    axes.set(title=title, xlabel="latents in use")
figure.colorbar(shown, ax=middle, label="|correlation|")
grid = nn.functional.pad(traversals(tc).unflatten(-1, (SIZE, SIZE)), (1, 1, 1, 1), value=0.5)
rows, columns = grid.shape[0] * (SIZE + 2), grid.shape[1] * (SIZE + 2)
right.imshow(grid.permute(0, 2, 1, 3).reshape(rows, columns), cmap="gray", vmin=0, vmax=1)
right.set(title="each of these, from −2 to 2", xticks=[], yticks=[])
picture = args.out / "total_correlation.png"
figure.savefig(picture, dpi=100)

print(f"ELBO: held-out ELBO {plain_history[0]:.2f} -> {plain_history[-1]:.2f} nats")
print(f"beta-TCVAE: held-out ELBO {history[0]:.2f} -> {history[-1]:.2f} nats, in {picture}")
