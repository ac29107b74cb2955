"""Data sets for the trainer: the bundled digits, arrays and folders of images."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DIGITS", "Dataset", "load"]

DIGITS = "digits"
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_NAMES = (("x", "y"), ("x_train", "y_train"))  # of an .npz: data and labels

Array = np.ndarray[Any, Any]


class Dataset(NamedTuple):
    """Examples, held in memory, and what they are called."""

    x: Tensor
    """float32, [N, ...]."""
    labels: Array | None
    """[N], numbers or strings; for the figures alone."""

    def fingerprint(self) -> str:
        """Shape and checksum, by which a resumed run knows its data again."""
        return f"{list(self.x.shape)} {zlib.crc32(self.x.numpy().data):08x}"


def load(source: str, *, counts: bool = False) -> Dataset:
    """The data set that `--data` names.

    Args:
        source: one of
            - "digits": scikit-learn's 1797 handwritten digits, [8, 8], in [0, 1];
            - an .npy file, or an .npz file with `x` and perhaps labels `y` (or `x_train`,
              `y_train`, or a single array): [N, D], [N, H, W], [N, C, H, W] or [N, H, W, C]; uint8
              is scaled to [0, 1], bool and floating-point values are taken as they are;
            - a folder of images of one size, scaled to [0, 1]; names of subfolders are labels;
            - for counts, also an .npz file of a SciPy sparse matrix, or an .h5ad file (with
              anndata), whose layer "counts" is taken if it has one.
        counts: numbers of any type are taken as they are.

    Raises:
        OSError: there is no such file or folder, or an image cannot be read.
        ValueError: it does not hold what is wanted; the message says what it holds.
    """
    if source == DIGITS:
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = digits.images if counts else digits.images / 16
        return Dataset(_examples(DIGITS, grey), digits.target)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{source!r} does not exist; want '{DIGITS}', an .npz or .npy file, or a folder of "
            "images"
        )
    if path.is_dir():
        x, labels = _load_folder(path)
    elif path.suffix == ".h5ad":
        x, labels = _load_anndata(path), None
    else:
        x, labels = _load_arrays(path)
    if labels is not None and labels.shape != x.shape[:1]:
        raise ValueError(
            f"{source} has labels of shape {list(labels.shape)}; want {list(x.shape[:1])}"
        )
    if not counts:
        return Dataset(_examples(source, x), labels)
    if not (np.issubdtype(x.dtype, np.number) or x.dtype == np.bool_) or np.iscomplexobj(x):
        raise ValueError(f"{source} has dtype {x.dtype}; want counts")
    return Dataset(_examples(source, np.asarray(x, np.float32)), labels)


def _load_arrays(path: Path) -> tuple[Array, Array | None]:
    try:
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            names = loaded.files
            if {"format", "shape", "data"} <= set(names):
                return _load_sparse(path), None
            for x, y in _NAMES:
                if x in names:
                    return loaded[x], loaded[y] if y in names else None
            if len(names) == 1:
                return loaded[names[0]], None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} is not readable; want an .npz or .npy file of numbers") from None
    raise ValueError(f"{path} holds the arrays {names}; want one named 'x', or a single one")


def _load_sparse(path: Path) -> Array:
    from scipy import sparse  # which scikit-learn needs too

    matrix: Array = sparse.load_npz(path).toarray()
    return matrix


def _load_anndata(path: Path) -> Array:
    try:
        import anndata
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} needs anndata; want pip install 'fastvae-kernels[counts]'"
        ) from None
    data = anndata.read_h5ad(path)
    x = data.layers.get("counts", data.X)
    return np.asarray(x.toarray() if hasattr(x, "toarray") else x)


def _load_folder(path: Path) -> tuple[Array, Array | None]:
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
    images: list[Array] = []
    for file in files:
        with Image.open(file) as image:
            grey = image.mode in ("1", "L")
            images.append(np.asarray(image.convert("L" if grey else "RGB")))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{file} has shape {list(images[-1].shape)}, {files[0].name} has "
                f"{list(images[0].shape)}; want images of one size, all grey or all in colour"
            )
    if not images:
        raise ValueError(f"{path} holds no images; want files {', '.join(_IMAGE_SUFFIXES)}")
    folders = [str(file.parent.relative_to(path)) for file in files]
    return np.stack(images), np.array(folders) if len(set(folders)) > 1 else None


def _examples(name: str, x: Array) -> Tensor:
    """The array as float32 examples."""
    images = x.ndim == 3 or (x.ndim == 4 and (x.shape[1] in (1, 3) or x.shape[3] in (1, 3)))
    if not (images or x.ndim == 2) or x.shape[0] < 2 or x.size == 0:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; want [N, D], [N, H, W], [N, C, H, W] or "
            "[N, H, W, C] with N of 2 or more and C of 1 or 3"
        )
    if x.dtype == np.uint8:
        x = x / np.float32(255)
    elif not (x.dtype == np.bool_ or np.issubdtype(x.dtype, np.floating)):
        raise ValueError(
            f"{name} has dtype {x.dtype}; want uint8, bool or floating-point, or a likelihood of "
            "counts"
        )
    with np.errstate(over="ignore"):  # what is too large for float32 is reported below
        x = np.ascontiguousarray(x, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
    if bad.size:
        raise ValueError(
            f"{name} has NaN or infinite values in {bad.size} of {len(x)} examples, the first at "
            f"index {bad[0]}; want finite numbers"
        )
    return torch.from_numpy(x)
