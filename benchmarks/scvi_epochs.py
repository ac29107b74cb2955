"""scvi-tools' SCVI with and without fastvae's patch: python benchmarks/scvi_epochs.py

Trains on simulated counts, from the same seed, in turns, and prints the seconds of an epoch (median
of the runs, which the first, warming, run is no part of) and the ELBO that each way reaches, over
seeds. Needs `pip install '.[scvi]'`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings

import anndata
import numpy as np
import scvi
import torch
from simulated_counts import simulate

import fastvae.integrations.scvi
from fastvae.bench import machine

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
scvi.settings.verbosity = logging.ERROR


def train(
    data: anndata.AnnData, likelihood: str, epochs: int, seed: int, patched: bool
) -> tuple[float, float]:
    """Seconds of an epoch, and the ELBO after the last."""
    scvi.settings.seed = seed
    model = scvi.model.SCVI(data, gene_likelihood=likelihood)
    patch = fastvae.integrations.scvi.patch() if patched else None
    try:
        start = time.perf_counter()
        model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, logger=False)
        seconds = (time.perf_counter() - start) / epochs
        return seconds, float(model.get_elbo())
    finally:
        if patch:
            patch.undo()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5, help="each from a seed of its own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--likelihoods", nargs="+", default=["zinb", "nb", "poisson"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counts, _ = simulate(arguments.cells, arguments.genes)
    data = anndata.AnnData(counts.astype(np.float32))
    scvi.model.SCVI.setup_anndata(data)
    about = machine.describe()
    print(
        f"{about['cpu']}, {about['cpu_capability']}, {arguments.threads} threads, scvi-tools "
        f"{scvi.__version__}; {arguments.cells} cells, {arguments.genes} genes, "
        f"{(counts == 0).mean():.0%} zeros; {arguments.runs} runs of {arguments.epochs} epochs"
    )
    for likelihood in arguments.likelihoods:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        elbos: dict[bool, list[float]] = {False: [], True: []}
        for run in range(-1, arguments.runs):
            for patched in (False, True):
                found = train(data, likelihood, arguments.epochs, max(run, 0), patched)
                if run >= 0:
                    seconds[patched].append(found[0])
                    elbos[patched].append(found[1])
        ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
        print(
            f"{likelihood:8s} {1e3 * statistics.median(seconds[False]):6.0f} ms an epoch, "
            f"{1e3 * statistics.median(seconds[True]):6.0f} patched: "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) times faster; "
            f"ELBO {np.mean(elbos[False]):.2f} ± {np.std(elbos[False]):.2f}, "
            f"{np.mean(elbos[True]):.2f} ± {np.std(elbos[True]):.2f} patched",
            flush=True,
        )


if __name__ == "__main__":
    main()
