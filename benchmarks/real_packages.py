"""Training steps of other packages with and without fastvae's patch of them:
python benchmarks/real_packages.py

For each model: the share of a step that the replaced calls take, forward alone (VAMP's holds its
encoder's pass over the pseudo-inputs); the processor time of a step (forward, backward and Adam) as
it is and patched, in turns, medians; how many calls of a step were served and passed on. Before
that, what holds no noise is compared. A package whose replaced calls are a small share of every
step has nothing to gain, and a line says so. Needs
`pip install '.[diffusers,pythae,multivae,pyro,scvi]'`; a package that is not there is a line that
says so. Epochs of scvi-tools, with their ELBO, are those of `benchmarks/scvi_epochs.py`, other
sizes of Pyro's VAE those of `benchmarks/pyro_steps.py`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastvae.bench import machine
from fastvae.integrations.patching import Patch

Step = Callable[[], object]
Models = Iterator[tuple[str, Step]]

_SMALL = 0.03  # share of a step, below which there is nothing to gain


def training(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    """A step of a module in PyTorch's usual style."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def diffusers_models() -> Models:
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

        yield name, training(model, loss)


def pythae_models() -> Models:
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
        yield name, training(model, partial(_loss, model, data, extra))


def multivae_models() -> Models:
    from multivae import models
    from multivae.data.datasets.base import MultimodalBaseDataset

    shapes = {"first": (1, 28, 28), "second": (3, 32, 32)}
    data = MultimodalBaseDataset({name: torch.rand(64, *shape) for name, shape in shapes.items()})
    for name in ("MVAE", "MoPoE", "JMVAE", "MVTCAE", "CRMVAE"):
        config = getattr(models, f"{name}Config")(n_modalities=2, latent_dim=16, input_dims=shapes)
        model = getattr(models, name)(config)
        yield name, training(model, partial(_loss, model, data, {}))


def _loss(model: Any, data: Any, options: dict[str, Any]) -> torch.Tensor:
    return model(data, **options).loss


def pyro_models() -> Models:
    import pyro
    from pyro import infer
    from pyro_steps import VAE

    for size, hidden, latent, batch in ((784, 400, 20, 128), (784, 32, 16, 256)):
        for elbo in ("Trace_ELBO", "TraceMeanField_ELBO"):
            pyro.clear_param_store()
            vae, x = VAE(size, hidden, latent), torch.randn(batch, size)
            optimizer = pyro.optim.Adam({"lr": 1e-4})
            svi = infer.SVI(vae.model, vae.guide, optimizer, loss=getattr(infer, elbo)())
            yield f"VAE, {size}-{hidden}-{latent}, {elbo}", partial(svi.step, x)


def scvi_models() -> Models:
    import anndata
    import scvi
    from simulated_counts import simulate

    scvi.settings.verbosity = logging.ERROR
    data = anndata.AnnData(simulate(128, 2000)[0].astype(np.float32))
    scvi.model.SCVI.setup_anndata(data)
    for likelihood in ("zinb", "nb", "poisson"):
        model = scvi.model.SCVI(data, gene_likelihood=likelihood)
        (batch,) = model._make_data_loader(adata=data, batch_size=128)
        loss = partial(_scvi_loss, model.module, batch)
        yield f"SCVI, {likelihood}", training(model.module, loss)


def _scvi_loss(module: Any, batch: Any) -> torch.Tensor:
    _, _, losses = module(batch)
    return losses.loss


def take(step: Step) -> float:
    """Seconds of one step, of this process."""
    start = time.process_time()
    step()
    return time.process_time() - start


def share_of(integration: Any, step: Step) -> float:
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
        whole = sum(take(step) for _ in range(5))
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
        if package == "pyro":
            import pyro.distributions as dist

            q, p = (dist.Normal(m, log_var.exp()).to_event(1) for m in (mu, z))
            return [q.log_prob(z), torch.distributions.kl_divergence(q, p)]
        if package == "scvi":
            return scvi_log_probs(mu.double().exp(), log_var.double().exp(), z.double())
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


def scvi_log_probs(
    mean: torch.Tensor, theta: torch.Tensor, logits: torch.Tensor
) -> list[torch.Tensor]:
    """In float64: in float32 scvi-tools' difference of gamma functions has fewer digits."""
    from scvi import distributions

    x = mean.round()
    return [
        distributions.ZeroInflatedNegativeBinomial(mu=mean, theta=theta, zi_logits=logits).log_prob(
            x
        ),
        distributions.NegativeBinomial(mu=mean, theta=theta).log_prob(x),
        distributions.Poisson(rate=mean).log_prob(x),
    ]


MODELS = {
    "diffusers": diffusers_models,
    "pythae": pythae_models,
    "multivae": multivae_models,
    "pyro": pyro_models,
    "scvi": scvi_models,
}


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
            difference = noiseless(package)
        except ImportError as error:
            print(f"{package}: left out, {error}")
            continue
        integration = importlib.import_module(f"fastvae.integrations.{package}")
        assert difference < 1e-5, f"{package}: noiseless losses differ by {difference:.1e}"
        shares = [
            row(package, name, step, integration, arguments.rounds)
            for name, step in MODELS[package]()  # one after the other: Pyro has one store
            if not arguments.models or name in arguments.models
        ]
        if shares and max(shares) < _SMALL:
            print(f"{package}: at most {max(shares):.1%} of a step, so there is nothing to gain")


def row(package: str, name: str, step: Step, integration: Any, rounds: int) -> float:
    """Prints a model's line; the share of the replaced calls."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for index in range(-3, rounds):
        for patched in (False, True) if index % 2 else (True, False):
            if patched:
                with integration.patch() as patch:
                    spent = take(step)
            else:
                spent = take(step)
            if index >= 0:
                seconds[patched].append(spent)
    ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    share = share_of(integration, step)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"| {package} | {name} | {share:.1%} | {1e3 * statistics.median(seconds[False]):.2f} "
        f"| {1e3 * statistics.median(seconds[True]):.2f} | {middle:.3f} ({low:.2f}–{high:.2f}) "
        f"| {sum(patch.served.values())} | {sum(patch.passed_on.values())} |",
        flush=True,
    )
    return share


if __name__ == "__main__":
    main()
