"""What a run learned, in one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from torch import Tensor

from ..files import write_bytes
from ..models.vae import VAE
from .counts import Statistics, replicate

__all__ = ["POINTS", "draw", "draw_images", "save"]

_ROWS, _COLUMNS = 8, 10
POINTS = 2000
"""Examples in the latent plane."""

Array = np.ndarray[Any, Any]


@torch.no_grad()
def draw(
    path: Path,
    model: VAE,
    history: Sequence[Mapping[str, float]],
    x: Tensor,
    labels: Array | None,
    *,
    seed: int = 0,
) -> None:
    """Draw the loss curve and the latent plane; and of images reconstructions beside originals and
    prior samples, of counts mean, variance and share of zeros beside those of the model's.

    Args:
        path: of the picture.
        model: in evaluation mode, with a latent of one dimension.
        history: one row an epoch, as in metrics.csv.
        x: at most `POINTS` examples on the model's device; the first are reconstructed.
        labels: [N], which colour the latent plane, or None.
        seed: of the prior samples.
    """
    figure = Figure(figsize=(13, 10), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(4, 5))
    _draw_loss(axes[0, 0], history)
    _draw_latent_plane(axes[0, 1], model.encode(x).mode.cpu().numpy(), labels)
    if model.likelihood.whole:
        _draw_counts(axes[1, 0], axes[1, 1], model, x, seed)
    else:
        _draw_examples(axes[1, 0], axes[1, 1], model, x, seed)
    save(path, figure)


def save(path: Path, figure: Figure) -> None:
    """Write a picture, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format=path.suffix[1:])
    write_bytes(path, buffer.getvalue())


def _draw_examples(left: Axes, right: Axes, model: VAE, x: Tensor, seed: int) -> None:
    shown = x[: _ROWS // 2 * _COLUMNS]
    lowest, highest = x.min().item(), x.max().item()
    pairs = zip(shown.split(_COLUMNS), model.reconstruct(shown).split(_COLUMNS), strict=True)
    rows = [row for pair in pairs for row in pair]
    samples = model.sample(_ROWS * _COLUMNS, seed=seed)
    left.set_title("held-out originals, each above its reconstruction")
    draw_images(left, rows, lowest, highest)
    right.set_title("samples from the prior")
    draw_images(right, list(samples.split(_COLUMNS)), lowest, highest)


def _draw_counts(left: Axes, right: Axes, model: VAE, x: Tensor, seed: int) -> None:
    data = Statistics.of(x.cpu())
    drawn = Statistics.of(replicate(model, x, seed=seed).cpu())
    for statistics, name, colour in ((data, "data", "C0"), (drawn, "model", "C1")):
        shown = (statistics.mean > 0) & (statistics.variance > 0)
        left.scatter(
            statistics.mean[shown], statistics.variance[shown], s=9, alpha=0.5, c=colour, label=name
        )
    low, high = data.mean[data.mean > 0].min().item(), data.mean.max().item()
    left.plot([low, high], [low, high], "k--", lw=1, label="variance = mean (Poisson)")
    left.set(xscale="log", yscale="log", xlabel="mean of a gene", ylabel="variance of a gene")
    left.set_title("mean and variance of each gene")
    left.grid(alpha=0.3)
    left.legend()
    right.scatter(data.zeros, drawn.zeros, s=9, alpha=0.5)
    right.plot([0, 1], [0, 1], "k--", lw=1)
    right.set(xlabel="share of zeros of a gene: data", ylabel="model")
    right.set_title(
        f"zeros: {data.zeros.mean().item():.1%} of the data, {drawn.zeros.mean().item():.1%} of "
        "the model's"
    )
    right.grid(alpha=0.3)


def _draw_loss(axes: Axes, history: Sequence[Mapping[str, float]]) -> None:
    epochs = [row["epoch"] for row in history]
    for name, key, sign, style in (
        ("train: −ELBO", "train_elbo", -1, "C0-"),
        ("held-out: −ELBO", "heldout_elbo", -1, "C1-"),
        ("held-out: rate", "heldout_rate", 1, "C2--"),
        ("held-out: distortion", "heldout_distortion", 1, "C3--"),
    ):
        axes.plot(epochs, [sign * row[key] for row in history], style, label=name)
    axes.set_title("loss: −ELBO = rate + distortion")
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per example")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_latent_plane(axes: Axes, mu: Array, labels: Array | None) -> None:
    points, names = _plane(mu)
    axes.set_title("latent plane: posterior means")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=12, alpha=0.7)
        return
    values, codes = np.unique(labels[: len(points)], return_inverse=True)
    if len(values) > 10:  # more than colours that can be told apart
        axes.scatter(points[:, 0], points[:, 1], c=codes, s=12, alpha=0.7)
        return
    for code, value in enumerate(values):
        x, y = points[codes == code].T
        axes.scatter(x, y, s=12, alpha=0.7, color=f"C{code}", label=_text(value))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False)


def _text(label: object) -> str:
    """A label from outside: no formula, and in the legend whatever it begins with."""
    text = str(label).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _plane(mu: Array) -> tuple[Array, tuple[str, str]]:
    """Two coordinates for each row of `mu`, and their names."""
    if mu.shape[1] == 1:
        return np.column_stack([mu, np.zeros_like(mu)]), ("μ", "")
    if mu.shape[1] == 2:
        return mu, ("$μ_1$", "$μ_2$")
    pca = PCA(n_components=2).fit(mu)
    first, second = (f"{share:.0%} of variance" for share in pca.explained_variance_ratio_)
    return pca.transform(mu), (f"first component, {first}", f"second component, {second}")


def draw_images(
    axes: Axes,
    rows: Sequence[Tensor],
    lowest: float,
    highest: float,
    names: Sequence[str] = (),
) -> None:
    """A grid of images, in rows called `names`; the values `lowest` and `highest` are black and
    white."""
    scale = max(highest - lowest, 1e-12)
    pictures = [_pictures(((row - lowest) / scale).clamp(0, 1).cpu().numpy()) for row in rows]
    height, width, *colours = pictures[0].shape[1:]
    gap = max(1, height // 16)
    canvas = np.zeros((len(rows) * (height + gap) + gap, _COLUMNS * (width + gap) + gap, *colours))
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            canvas[top : top + height, left : left + width] = picture
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
    axes.set_xticks([])
    axes.set_yticks([gap + i * (height + gap) + height / 2 for i in range(len(names))], names)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)


def _pictures(x: Array) -> Array:
    """Examples as [N, H, W] or [N, H, W, 3]."""
    if x.ndim == 2:  # vectors: squares where they can be
        side = math.isqrt(x.shape[1])
        return x.reshape(len(x), side, side) if side**2 == x.shape[1] else x[:, None, :]
    if x.ndim == 4:
        return x[:, 0] if x.shape[1] == 1 else x.transpose(0, 2, 3, 1)
    return x
