"""Writes images of shapes, as `python benchmarks/simulated_images.py shapes.npz`.

Discs, rings, bars and crosses of 28x28 grey pixels, at any place, size, angle and stroke, with
smooth edges. The file holds them as x, uint8, and the kind of shape as y.
"""

from __future__ import annotations

import argparse

import numpy as np

KINDS = ("disc", "ring", "bar", "cross")


def simulate(images: int, size: int = 28, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images [images, size, size] in uint8, and the kinds of their shapes."""
    rng = np.random.default_rng(seed)
    x = np.empty((images, size, size), np.uint8)
    labels = rng.integers(len(KINDS), size=images)
    for start in range(0, images, 1000):  # memory is that of a thousand
        part = slice(start, start + 1000)
        x[part] = _draw(labels[part], size, rng)
    return x, labels


def _draw(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    def drawn(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, size=(len(labels), 1, 1))

    places = (np.arange(size) + 0.5) / size
    across, down = places - drawn(0.35, 0.65), places[:, None] - drawn(0.35, 0.65)
    angle, radius, stroke = drawn(0, np.pi), drawn(0.12, 0.33), drawn(0.02, 0.05)
    u = np.cos(angle) * across + np.sin(angle) * down
    v = np.cos(angle) * down - np.sin(angle) * across
    # How far from the shape's edge, above 0 outside.
    disc = np.hypot(u, v) - radius
    bar = np.maximum(np.abs(u) - radius, np.abs(v) - stroke)
    other = np.maximum(np.abs(v) - radius, np.abs(u) - stroke)
    shapes = np.stack([disc, np.abs(disc) - stroke, bar, np.minimum(bar, other)])
    distance = shapes[labels, np.arange(len(labels))]
    return np.rint(255 * np.clip(0.5 - size * distance / 2, 0, 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="an .npz file to write")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    x, labels = simulate(arguments.images, arguments.size, arguments.seed)
    np.savez_compressed(arguments.file, x=x, y=np.array(KINDS)[labels])
    shape = "x".join(map(str, x.shape[1:]))
    print(f"{len(x)} images of {shape}, {x.nbytes / 1e6:.0f} MB, in {arguments.file}")
