"""Folders of images."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SUFFIXES", "load"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# What the trainer draws itself, beside the file that tells it from a user's picture.
_OWN = {"figure.png": "checkpoint.pt", "sweep.png": "sweep.csv"}

Array = np.ndarray[Any, Any]


def load(path: Path, *, counts: bool = False, workers: int = 1) -> tuple[Array, Array | None]:
    """The images in a folder and its subfolders, and their subfolders' names if there are several.

    Hidden files and folders, such as .ipynb_checkpoints, are left out, and so are the pictures of
    runs.

    Args:
        path: of the folder.
        counts: whether grey values and colours are left as they are, instead of being scaled to
            [0, 1].
        workers: how many threads read files.

    Returns:
        float32, [N, H, W] or [N, 3, H, W]; and [N] or None.

    Raises:
        OSError: a folder cannot be read.
        ValueError: there are no images, they are not of one size and kind, or one is damaged or of
            a kind without a known range; the message names it.
    """
    files = sorted(_files(path))
    x, first = np.empty(0, np.float32), None
    pool = ThreadPoolExecutor(workers)
    try:
        read = pool.map(_read, files, itertools.repeat(counts))
        for i, (file, (image, kind)) in enumerate(zip(files, read, strict=True)):
            kind = f"shape {list(image.shape)}{kind}"
            if first is None:
                x, first = np.empty((len(files), *image.shape), np.float32), kind
            if kind != first:
                raise ValueError(
                    f"{file} has {kind}, {files[0].name} has {first.removeprefix('shape ')}; want "
                    "images of one size, all grey or all in colour"
                )
            x[i] = image
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nobody waits for the others
    if not files:
        raise ValueError(f"{path} holds no images; want files {', '.join(SUFFIXES)}")
    folders = [str(file.parent.relative_to(path)) for file in files]
    return x, np.array(folders) if len(set(folders)) > 1 else None


def _files(path: Path) -> list[Path]:
    def failed(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(path, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if Path(name).suffix.lower() in SUFFIXES
            and not name.startswith(".")
            and _OWN.get(name) not in names
        ]
    return found


def _read(file: Path, counts: bool) -> tuple[Array, str]:
    """An image as float32, [H, W] or [3, H, W], and what else must be the same for all."""
    try:
        return _values(file, counts)
    except Exception as error:  # a damaged file gives any of a dozen types
        said = str(error).replace(f" {str(file)!r}", "")
        raise ValueError(f"{file} cannot be read: {said}") from error


def _values(file: Path, counts: bool) -> tuple[Array, str]:
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format != "MPO":  # a photograph with its preview
            raise ValueError(f"it has {frames} frames; want files of one image each")
        mode, is_png = opened.mode, opened.format == "PNG"
        image = ImageOps.exif_transpose(opened)
    if mode == "F":
        return np.asarray(image, np.float32), " of floats"
    if mode == "1" and not image.has_transparency_data:
        return np.asarray(image, np.float32), ""
    highest = 255
    if mode.startswith("I;16") or (mode == "I" and is_png):  # "I": before Pillow 11
        highest = 65535
    elif mode in ("1", "L", "LA", "La"):
        image = image.convert("LA" if image.has_transparency_data else "L")
    elif mode in ("P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    else:
        raise ValueError(f"it has Pillow's mode {mode}, of unknown range; want 8 or 16 bits")
    x: Array = np.asarray(image, np.float32)
    if image.mode in ("LA", "RGBA"):
        # What is transparent shows white, not the colour that is hidden there.
        alpha = x[..., -1:] / highest
        x = x[..., :-1] * alpha + highest * (1 - alpha)
        x = x[..., 0] if image.mode == "LA" else x
    if x.ndim == 3:
        x = np.moveaxis(x, -1, 0)
    return x if counts else x / np.float32(highest), ""
