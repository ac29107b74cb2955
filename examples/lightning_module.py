"""A `fastvae.VAE` trained by Lightning.

    pip install lightning
    python examples/lightning_module.py

The model is an ordinary module, whose output has the loss and its parts; Lightning does the rest.
"""

import argparse
from pathlib import Path

import lightning
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fastvae

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
args = parser.parse_args()


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vae = fastvae.VAE(
            nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * 8)),
            nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 64)),
            latent_shape=8,
            likelihood=fastvae.OptimalGaussian(),
        )
        self.history: list[tuple[float, float]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.vae(batch[0]).loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        output = self.vae(batch[0])
        self.log_dict({"elbo": output.bound.mean(), "rate": output.kl.mean()})

    def on_validation_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.history.append((metrics["elbo"].item(), metrics["rate"].item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


lightning.seed_everything(0)
digits = TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 16)
train, held_out = random_split(digits, [len(digits) - 200, 200])
module = Module()
trainer = lightning.Trainer(
    max_epochs=args.epochs,
    accelerator="cpu",
    num_sanity_val_steps=0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(held_out, 200))

elbo, rate = torch.tensor(module.history).T
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(range(1, args.epochs + 1), elbo, label="ELBO")
left.plot(range(1, args.epochs + 1), rate, label="rate, KL(q(z | x) ‖ p(z))")
left.set(xlabel="epoch", ylabel="held out, nats")
left.legend()
images = nn.functional.pad(module.vae.sample(40).reshape(4, 10, 8, 8), (1, 1, 1, 1))
right.imshow(images.permute(0, 2, 1, 3).reshape(40, 100), cmap="gray_r", vmin=0, vmax=1)
right.set_title("sampled", fontsize=10)
right.axis("off")
picture = args.out / "lightning_module.png"
figure.savefig(picture, dpi=100)

print(f"held-out ELBO {elbo[0]:.2f} -> {elbo[-1]:.2f} nats, in {picture}")
