"""A training step of a VAE in Pyro with and without fastvae's patch: benchmarks/pyro_steps.py

A step is `SVI.step` with `TraceMeanField_ELBO`, `Trace_ELBO` or `TraceGraph_ELBO` and Adam, of a
784-400-20 VAE with a Gaussian likelihood, or of ones whose networks are small. Original and patched
take turns; printed is the median of a step's processor time, and of the turns' ratios. Needs
`pip install '.[pyro]'`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from pyro import infer
from torch import Tensor, nn

import fastvae.integrations.pyro
from fastvae.bench import machine

ELBOS = ["TraceMeanField_ELBO", "Trace_ELBO", "TraceGraph_ELBO"]


class VAE(nn.Module):
    """As in Pyro's tutorial, with a Gaussian likelihood of a learned sigma."""

    def __init__(self, size: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Linear(size, hidden), nn.Softplus(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.Softplus(), nn.Linear(hidden, size)
        )
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), self.latent)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            likelihood = dist.Normal(self.decoder(z), self.log_sigma.exp()).to_event(1)
            pyro.sample("x", likelihood, obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--elbos", nargs="+", default=ELBOS)
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["128x784x400x20", "256x784x32x16", "8x16x16x4"],
        help="batch x data x hidden x latent",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine.describe()
    print(f"{about['cpu']}, {about['cpu_capability']}, one thread, pyro {pyro.__version__}")
    for shape in arguments.shapes:
        batch, size, hidden, latent = map(int, shape.split("x"))
        for name in arguments.elbos:
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            vae, x = VAE(size, hidden, latent), torch.randn(batch, size)
            optimizer = pyro.optim.Adam({"lr": 1e-4})
            svi = infer.SVI(vae.model, vae.guide, optimizer, loss=getattr(infer, name)())

            def turn(svi: infer.SVI = svi, x: Tensor = x) -> float:
                svi.step(x)
                start = time.process_time()
                for _ in range(arguments.steps):
                    svi.step(x)
                return (time.process_time() - start) / arguments.steps

            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(arguments.turns):
                times[False].append(turn())
                with fastvae.integrations.pyro.patch():
                    times[True].append(turn())
            ratios = [a / b for a, b in zip(times[False], times[True], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"{shape:16s} {name:20s} {1e3 * statistics.median(times[False]):7.2f} ms a step, "
                f"{1e3 * statistics.median(times[True]):7.2f} patched: "
                f"{middle:.2f} ({low:.2f}–{high:.2f}) times faster",
                flush=True,
            )


if __name__ == "__main__":
    main()
