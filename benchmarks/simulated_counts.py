"""Writes counts like those of single cells, as `python benchmarks/simulated_counts.py counts.npz`.

Cells of a few types, each a point of a low-dimensional latent with some spread; genes whose shares
follow from it, log-linearly; totals that vary by a factor of two; negative-binomial counts; and a
part of them lost, more often of genes that are rare. The file holds them as x, the types as y;
with `--sparse` it is a SciPy sparse matrix, without types.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import sparse


def simulate(
    cells: int, genes: int, *, types: int = 6, dropout: float = 0.1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [cells, genes] and the cells' types."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(types, size=cells)
    centres = 2 * rng.normal(size=(types, 5))
    z = centres[labels] + 0.6 * rng.normal(size=(cells, 5))
    log_share = rng.normal(0, 1.2, size=genes) + 0.3 * z @ rng.normal(size=(5, genes))
    share = np.exp(log_share - log_share.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    totals = 1.5 * genes * np.exp(0.5 * rng.normal(size=(cells, 1)))
    mean, theta = totals * share, np.exp(rng.normal(1, 0.7, size=genes))
    x = rng.poisson(rng.gamma(theta, mean / theta))
    lost = dropout * 2 / (1 + np.exp(0.5 * np.log(mean.mean(0) + 1e-9)))
    return np.where(rng.random(x.shape) < lost, 0, x).astype(np.int32), labels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="an .npz file to write")
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="a SciPy matrix, unlabelled")
    arguments = parser.parse_args()
    x, labels = simulate(
        arguments.cells, arguments.genes, dropout=arguments.dropout, seed=arguments.seed
    )
    if arguments.sparse:
        sparse.save_npz(arguments.file, sparse.csr_matrix(x))
    else:
        np.savez_compressed(arguments.file, x=x, y=labels)
    print(f"{len(x)} cells, {x.shape[1]} genes, {(x == 0).mean():.1%} zeros, in {arguments.file}")
