"""A VAE in a plain PyTorch loop, with three of its lines replaced by fastvae's.

    python examples/plain_loop.py

The lines that they replace stand above them. Everything else is PyTorch as it was.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import fastvae

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
args = parser.parse_args()

torch.manual_seed(0)
digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16  # 1797 images of 8x8 pixels
digits = digits[torch.randperm(len(digits))]
train, held_out = digits[200:], digits[:200]

LATENTS, SIGMA = 8, 0.2
encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * LATENTS))
decoder = nn.Sequential(nn.Linear(LATENTS, 256), nn.ReLU(), nn.Linear(256, 64))
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)


def elbo(x: torch.Tensor) -> torch.Tensor:
    """The evidence lower bound of each example, in nats."""
    mu, logvar = encoder(x).chunk(2, dim=1)

    # std = torch.exp(0.5 * logvar); z = mu + std * torch.randn_like(std)
    # kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)
    z, kl = fastvae.rsample_kl(mu, logvar)

    # log_px = torch.distributions.Normal(decoder(z), SIGMA).log_prob(x).sum(1)
    log_px = fastvae.gaussian_log_prob(x, decoder(z), SIGMA, param="std")

    return log_px - kl


history = []
for epoch in range(args.epochs):
    for x in train[torch.randperm(len(train))].split(64):
        loss = -elbo(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        history.append(elbo(held_out).mean().item())
    if epoch % 10 == 0:
        print(f"epoch {epoch + 1}: held-out ELBO {history[-1]:.2f} nats", flush=True)

with torch.no_grad():
    originals = held_out[:12]
    reconstructed = decoder(encoder(originals).chunk(2, dim=1)[0])
    sampled = decoder(torch.randn(12, LATENTS))

figure = plt.figure(figsize=(8, 2.6), layout="constrained")
curve, images = figure.subfigures(1, 2, width_ratios=(1, 2))
axes = curve.subplots()
axes.plot(range(1, args.epochs + 1), history)
axes.set(xlabel="epoch", ylabel="held-out ELBO, nats")
titles = ("held out", "reconstructed", "sampled")
for row, title, x in zip(
    images.subplots(3, 1), titles, (originals, reconstructed, sampled), strict=True
):
    strip = nn.functional.pad(x.reshape(12, 8, 8), (1, 1)).permute(1, 0, 2).flatten(1)
    row.imshow(strip, cmap="gray_r", vmin=0, vmax=1)
    row.set_title(title, fontsize=9, loc="left")
    row.axis("off")
picture = args.out / "plain_loop.png"
figure.savefig(picture, dpi=110)

print(f"held-out ELBO {history[0]:.2f} -> {history[-1]:.2f} nats, in {picture}")
