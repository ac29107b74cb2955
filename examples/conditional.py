"""A conditional VAE: which digit it is, is given; z is left with the handwriting.

    python examples/conditional.py

Encoder and decoder are modules of your own that take the condition as their second argument.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastvae

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
args = parser.parse_args()

torch.manual_seed(0)
data = load_digits()
order = torch.randperm(len(data.data))
digits = torch.tensor(data.data, dtype=torch.float32)[order] / 16
labels = nn.functional.one_hot(torch.tensor(data.target)[order].long(), 10).float()


class WithCondition(nn.Module):
    """A network of what it is given and of the condition beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs + 10, 256), nn.ReLU(), nn.Linear(256, outputs))

    def forward(self, t: Tensor, condition: Tensor) -> Tensor:
        return self.layers(torch.cat([t, condition], dim=1))


LATENTS = 6
model = fastvae.VAE(
    WithCondition(64, 2 * LATENTS),
    WithCondition(LATENTS, 64),
    latent_shape=LATENTS,
    likelihood=fastvae.Gaussian(sigma=0.2),
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

history = []
for epoch in range(args.epochs):
    for rows in (200 + torch.randperm(len(digits) - 200)).split(64):
        loss = model(digits[rows], labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        history.append(model(digits[:200], labels[:200]).bound.mean().item())
    if epoch % 10 == 0:
        print(f"epoch {epoch + 1}: held-out ELBO {history[-1]:.2f} nats", flush=True)

# The handwriting of eight held-out digits, writing all ten.
with torch.no_grad():
    writers, each = digits[:8], torch.eye(10)
    z = model.encode(writers, labels[:8]).mode
    written = model.likelihood.mean(
        model.decode(z.repeat_interleave(10, 0), each.repeat(8, 1))
    ).reshape(8, 10, 64)

figure, grid = plt.subplots(8, 12, figsize=(6, 3.8), layout="constrained")
for row, writer, copies in zip(grid, writers, written, strict=True):
    for axes, x in zip(row, [writer, None, *copies], strict=True):
        axes.axis("off")
        if x is not None:
            axes.imshow(x.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
grid[0, 0].set_title("held out", fontsize=9, loc="left")
for digit in range(10):
    grid[0, digit + 2].set_title(str(digit), fontsize=9)
picture = args.out / "conditional.png"
figure.savefig(picture, dpi=110)

print(f"held-out ELBO {history[0]:.2f} -> {history[-1]:.2f} nats, in {picture}")
