"""The shapes that ops are timed on."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["IDIOM_SHAPES", "SAMPLES", "SHAPES", "Shape", "Size"]

Size = tuple[int, ...]

HALVES = "-halves"
SAMPLES = 50  # of an importance-weighted bound


@dataclass(frozen=True)
class Shape:
    """The elements of one call, or of the several calls of a hierarchical model.

    In halves, mu and logvar are what `chunk(2, dim=1)` gives of the encoder's output; their
    gradient is that of the whole.
    """

    name: str
    sizes: tuple[Size, ...]
    halves: bool = False
    text: str = ""

    @classmethod
    def parse(cls, name: str, text: str = "") -> Shape:
        """A shape of the table, or such as "128x20" and "4x8x64x64-halves".

        Raises:
            ValueError: it is neither.
        """
        if name in SHAPES:
            return SHAPES[name]
        if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*)+({HALVES})?", name):
            known = ", ".join(SHAPES)
            raise ValueError(f"is {name!r}; want sizes as in 128x20, 128x40{HALVES}, or {known}")
        halves = name.endswith(HALVES)
        rows, columns, *rest = map(int, name.removesuffix(HALVES).split("x"))
        if halves and columns % 2:
            raise ValueError(f"is {name!r}; want an even second size, to be halved")
        return cls(name, ((rows, columns // 2 if halves else columns, *rest),), halves, text)


# The decoder of the CIFAR-10 model of Child 2021, "Very Deep VAEs Generalize Autoregressive Models
# and Can Outperform Them on Images": resolution -> blocks, each with 16 latent channels, batch 16.
_VDVAE = {1: 1, 4: 3, 8: 6, 16: 11, 32: 22}

SHAPES: dict[str, Shape] = {}
for _name, _text in (
    ("128x20", "MNIST"),
    ("128x10", "single-cell counts"),
    ("4x8x64x64", "latent diffusion, images"),
    ("4x8x64x64-halves", "as the encoder gives them"),
    ("1x32x21x60x104", "latent diffusion, video"),
    ("1x32x21x60x104-halves", "as the encoder gives them"),
    ("128x784", "MNIST likelihood"),
    ("64x3x64x64", "image likelihood"),
    ("128x2000", "variable genes of single cells"),
    ("128x10000", "all genes of single cells"),
    ("1024x128", "wide latent"),
    ("128x64", f"{SAMPLES} samples of it"),
    ("128x40", "VampPrior's latent"),
    ("256x64", "against a large mixture"),
    ("512x50000", "a catalogue"),
    ("16x3x32x32", "images in colour"),
    ("1024x32x32", "categorical latents of a world model"),
    ("256x32", "total correlation of a batch"),
    ("1024x32", "of a large batch"),
    ("64x16384", "large"),
    ("32x262144", "larger than any cache"),
):
    SHAPES[_name] = Shape.parse(_name, _text)
SHAPES["vdvae"] = Shape(
    "vdvae",
    tuple((16, 16, r, r) for r, blocks in _VDVAE.items() for _ in range(blocks)),
    halves=True,
    text="43 levels of a deep hierarchical VAE",
)

# Where it is shown that no op is slower than what users write in its place (peers.IDIOMS).
IDIOM_SHAPES = ("8x8", "128x10", "128x20", "128x784", "64x12288", "64x65536")
