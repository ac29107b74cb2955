"""A hierarchical VAE: three levels of latents, each with a prior that the level above gives.

    python examples/hierarchy.py

A ladder (Sønderby et al. 2016): the encoder goes up once, then one pass down computes, level by
level, the prior p(z_l | above), the posterior q(z_l | above, x), a sample and the KL divergence
between them, which `fastvae.rsample_kl` does in one call. Free bits (Kingma et al. 2016) keep the
upper levels in use.
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
digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16
digits = digits[torch.randperm(len(digits))]
train, held_out = digits[200:], digits[:200]

LATENTS = (2, 4, 8)  # from the top down
FREE = 3.0  # nats of each level that cost nothing: without, the upper levels stay unused
WIDTH, SIGMA = 128, 0.2


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, outputs))


class Hierarchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        levels = range(len(LATENTS))
        self.start = nn.Parameter(torch.zeros(WIDTH))  # the state above the top level
        self.up = nn.ModuleList(mlp(64 if i == 0 else WIDTH, WIDTH) for i in levels)
        self.prior = nn.ModuleList(mlp(WIDTH, 2 * n) for n in LATENTS)
        self.posterior = nn.ModuleList(mlp(2 * WIDTH, 2 * n) for n in LATENTS)
        self.down = nn.ModuleList(mlp(WIDTH + n, WIDTH) for n in LATENTS)
        self.decoder = nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """ln p(x | z), [B], and the KL of each level, [B] each; in nats."""
        seen = [self.up[0](x)]
        for up in self.up[1:]:
            seen.append(up(seen[-1]))
        state, rates = self.start.expand(len(x), -1), []
        for prior, posterior, down, features in zip(
            self.prior, self.posterior, self.down, reversed(seen), strict=True
        ):
            p_mu, p_logvar = prior(state).chunk(2, dim=1)
            mu, logvar = posterior(torch.cat([state, features], dim=1)).chunk(2, dim=1)
            z, kl = fastvae.rsample_kl(mu, logvar, p_mu, p_logvar)
            state = state + down(torch.cat([state, z], dim=1))
            rates.append(kl)
        return fastvae.gaussian_log_prob(x, self.decoder(state), SIGMA, param="std"), rates

    @torch.no_grad()
    def sample(self, n: int, kept: int) -> Tensor:
        """n images that share the z of the upper `kept` levels."""
        state = self.start.expand(n, -1)
        for level, (prior, down) in enumerate(zip(self.prior, self.down, strict=True)):
            mu, logvar = prior(state).chunk(2, dim=1)
            z = fastvae.rsample(mu, logvar)
            if level < kept:
                z = z[:1].expand(n, -1)
            state = state + down(torch.cat([state, z], dim=1))
        return self.decoder(state)


model = Hierarchy()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

history = []
for epoch in range(args.epochs):
    for x in train[torch.randperm(len(train))].split(64):
        log_px, rates = model(x)
        loss = sum(kl.mean().clamp(min=FREE) for kl in rates) - log_px.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        log_px, rates = model(held_out)
        history.append((log_px - sum(rates)).mean().item())
    if epoch % 10 == 0:
        each = ", ".join(f"{kl.mean():.1f}" for kl in rates)
        print(f"epoch {epoch + 1}: held-out ELBO {history[-1]:.2f} nats, rates {each}", flush=True)

figure, panels = plt.subplots(1, 3, figsize=(8, 2.45), layout="constrained")
titles = ("all drawn anew", "one z₁ for each row", "one z₁ and z₂ for each row")
for kept, (axes, title) in enumerate(zip(panels, titles, strict=True)):
    images = torch.stack([model.sample(8, kept) for row in range(6)]).reshape(6, 8, 8, 8)
    images = nn.functional.pad(images, (1, 1, 1, 1))
    axes.imshow(images.permute(0, 2, 1, 3).reshape(60, 80), cmap="gray_r", vmin=0, vmax=1)
    axes.set_title(f"{title}\nrate of z{'₁₂₃'[kept]}: {rates[kept].mean():.1f} nats", fontsize=9)
    axes.axis("off")
picture = args.out / "hierarchy.png"
figure.savefig(picture, dpi=110)

print(f"held-out ELBO {history[0]:.2f} -> {history[-1]:.2f} nats, in {picture}")
