"""Training steps of other packages with and without fastvae's patch of them:
python benchmarks/real_packages.py

For each model: the share of a step that the replaced calls take, forward alone (VAMP's holds its
encoder's pass over the pseudo-inputs); the time of a step (forward, backward and Adam) as it is and
patched, in turns, medians; how many calls of a step were served and passed on. Before that, losses
that hold no noise are compared. Needs `pip install '.[diffusers,pythae,multivae]'`; a package that
is not there is a line that says so. scvi-tools has `benchmarks/scvi_epochs.py`.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fastvae.bench import machine
from fastvae.integrations.patching import Patch

Step = Callable[[], torch.Tensor]


def diffusers_models() -> Iterator[tuple[str, torch.nn.Module, Step]]:
    from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 8}
    images = AutoencoderKL(
        up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[16, 32], **blocks
    )
    videos = AutoencoderKLCogVideoX(
        down_block_types=["CogVideoXDownBlock3D"] * 2,
        up_block_types=["CogVideoXUpBlock3D"] * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    )
    for name, model, x in (
        ("AutoencoderKL", images, torch.rand(4, 3, 64, 64)),
        ("AutoencoderKLCogVideoX", videos, torch.rand(1, 3, 5, 32, 32)),
    ):

        def loss(model: Any = model, x: torch.Tensor = x) -> torch.Tensor:
            q = model.encode(x).latent_dist
            return (model.decode(q.sample()).sample - x).square().mean() + 1e-6 * q.kl().mean()

        yield name, model, loss


def pythae_models() -> Iterator[tuple[str, torch.nn.Module, Step]]:
    from pythae import models

    for name, infix in (
        ("VAE", ""),
        ("BetaVAE", ""),
        ("BetaTCVAE", ""),
        ("VAMP", ""),
        ("INFOVAE_MMD", "_"),
        ("IWAE", ""),
    ):
        config = getattr(models, f"{name}{infix}Config")
        model = getattr(models, name)(config(input_dim=(1, 28, 28), latent_dim=16))
        data = {"data": torch.rand(128, 1, 28, 28)}
        extra = {"dataset_size": 50_000} if name == "BetaTCVAE" else {}
        yield name, model, lambda model=model, data=data, extra=extra: model(data, **extra).loss


def multivae_models() -> Iterator[tuple[str, torch.nn.Module, Step]]:
    from multivae import models
    from multivae.data.datasets.base import MultimodalBaseDataset

    shapes = {"first": (1, 28, 28), "second": (3, 32, 32)}
    data = MultimodalBaseDataset({name: torch.rand(64, *shape) for name, shape in shapes.items()})
    for name in ("MVAE", "MoPoE", "JMVAE", "MVTCAE", "CRMVAE"):
        config = getattr(models, f"{name}Config")(n_modalities=2, latent_dim=16, input_dims=shapes)
        model = getattr(models, name)(config)
        yield name, model, lambda model=model: model(data).loss


def take(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Step) -> float:
    """Seconds of one step, of this process."""
    start = time.process_time()
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    return time.process_time() - start


def share_of(integration: Any, step: Callable[[], float]) -> float:
    """What the calls that the patch replaces take of a step, forward, unpatched."""
    spent, depth = 0.0, 0

    def timed(self: Patch, original: Any, replacement: Any, label: str) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent, depth
            depth += 1
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:  # one may call another
                    spent += time.process_time() - start

        return function

    with mock.patch.object(Patch, "_instead_of", timed), integration.patch():
        step()
        spent = 0.0
        whole = sum(step() for _ in range(5))
    return spent / whole


def noiseless(package: str) -> float:
    """The largest relative difference of what holds no noise, original and patched."""
    integration = importlib.import_module(f"fastvae.integrations.{package}")
    generator = torch.Generator().manual_seed(0)

    def values() -> list[torch.Tensor]:
        generator.manual_seed(0)
        mu, log_var, z = (torch.randn(64, 16, generator=generator) for _ in range(3))
        x, recon = (torch.rand(64, 1, 28, 28, generator=generator) for _ in range(2))
        if package == "diffusers":
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            both = torch.randn(4, 8, 32, 32, generator=generator)
            q = DiagonalGaussianDistribution(both)
            return [q.kl(), q.nll(q.mode() + 1)]
        if package == "pythae":
            from pythae.models import VAE, BetaTCVAE, BetaTCVAEConfig, VAEConfig

            size = {"input_dim": (1, 28, 28), "latent_dim": 16}
            return [
                VAE(VAEConfig(**size)).loss_function(recon, x, mu, log_var, z)[0],
                BetaTCVAE(BetaTCVAEConfig(**size)).loss_function(recon, x, mu, log_var, z, 5000)[0],
            ]
        assert package == "multivae"
        from multivae.models.base.base_utils import kl_divergence

        zeros = torch.zeros_like(mu)
        return [
            kl_divergence(mu, log_var, zeros, zeros),
            torch.distributions.Normal(recon, 0.75).log_prob(x).sum(),
            torch.distributions.Laplace(recon, 0.75).log_prob(x).sum(),
        ]

    original = values()
    with integration.patch() as patch:
        ours = values()
    assert patch.served, "nothing was served"
    pairs = zip(original, ours, strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


MODELS = {"diffusers": diffusers_models, "pythae": pythae_models, "multivae": multivae_models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    about = machine.describe()
    print(f"{about['cpu']}, {about['cpu_capability']}, {arguments.threads} threads")
    print(
        "| package | model | share | a step, ms | patched | ratio (quartiles) | served "
        "| passed on |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for package in arguments.packages:
        try:
            models = list(MODELS[package]())
        except ImportError as error:
            print(f"{package}: left out, {error}")
            continue
        integration = importlib.import_module(f"fastvae.integrations.{package}")
        difference = noiseless(package)
        assert difference < 1e-5, f"{package}: noiseless losses differ by {difference:.1e}"
        for name, model, loss in models:
            if arguments.models and name not in arguments.models:
                continue
            row(package, name, model.train(), loss, integration, arguments.rounds)


def row(
    package: str, name: str, model: torch.nn.Module, loss: Step, integration: Any, rounds: int
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for index in range(-3, rounds):
        for patched in (False, True) if index % 2 else (True, False):
            if patched:
                with integration.patch() as patch:
                    spent = take(model, optimizer, loss)
            else:
                spent = take(model, optimizer, loss)
            if index >= 0:
                seconds[patched].append(spent)
    ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    share = share_of(integration, lambda: take(model, optimizer, loss))
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"| {package} | {name} | {share:.1%} | {1e3 * statistics.median(seconds[False]):.2f} "
        f"| {1e3 * statistics.median(seconds[True]):.2f} "
        f"| {statistics.median(seconds[False]) / statistics.median(seconds[True]):.3f} "
        f"({low:.2f}–{high:.2f}) "
        f"| {sum(patch.served.values())} | {sum(patch.passed_on.values())} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
