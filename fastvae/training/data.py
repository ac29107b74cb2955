"""Data sets for the trainer: the bundled digits, arrays and folders of images."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import images

__all__ = ["DIGITS", "Dataset", "load"]

DIGITS = "digits"
_NAMES = (("x", "y"), ("x_train", "y_train"))  # of an .npz: data and labels

Array = np.ndarray[Any, Any]


class Dataset(NamedTuple):
    """Examples, held in memory, and what they are called."""

    x: Tensor
    """float32: vectors [N, D], grey images [N, H, W], or images [N, C, H, W]."""
    labels: Array | None
    """[N], numbers or strings; for the figures alone."""

    def fingerprint(self) -> str:
        """Shape and checksum, by which a resumed run knows its data again."""
        return f"{list(self.x.shape)} {zlib.crc32(self.x.numpy().data):08x}"


def load(source: str, *, counts: bool = False, workers: int = 1) -> Dataset:
    """The data set that `--data` names.

    Args:
        source: one of
            - "digits": scikit-learn's 1797 handwritten digits, [8, 8], in [0, 1];
            - an .npy file, or an .npz file with `x` and perhaps labels `y` (or `x_train`,
              `y_train`, or a single array): [N, D], [N, H, W], [N, C, H, W] or [N, H, W, C], which
              becomes [N, C, H, W]; uint8 is scaled to [0, 1], bool and floating-point values are
              taken as they are;
            - a folder of images of one size, of 1, 8 or 16 bits, scaled to [0, 1], or of floats,
              taken as they are; what is transparent shows white, and photographs are turned as
              their EXIF tag says; names of subfolders are labels;
            - for counts, also an .npz file of a SciPy sparse matrix, or an .h5ad file (with
              anndata), whose layer "counts" is taken if it has one.
        counts: numbers of any type are taken as they are.
        workers: how many threads read the images of a folder.

    Raises:
        OSError: there is no such file or folder, or it may not be read.
        ValueError: it does not hold what is wanted, or is damaged; the message says what it holds.
    """
    try:
        return _load(source, counts, workers)
    except MemoryError as error:
        raise ValueError(f"{source} does not fit in memory: {error}") from error


def _load(source: str, counts: bool, workers: int) -> Dataset:
    if source == DIGITS:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return Dataset(_examples(DIGITS, digits.images / (1 if counts else 16)), digits.target)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{source!r} does not exist; want '{DIGITS}', an .npz or .npy file, or a folder of "
            "images"
        )
    if path.is_dir():
        x, labels = images.load(path, counts=counts, workers=workers)
    elif path.suffix == ".h5ad":
        x, labels = _load_anndata(path), None
    else:
        x, labels = _load_arrays(path)
    if labels is not None and labels.shape == (*x.shape[:1], 1):
        labels = labels[:, 0]
    if labels is not None and labels.shape != x.shape[:1]:
        raise ValueError(
            f"{source} has labels of shape {list(labels.shape)}; want {list(x.shape[:1])}"
        )
    return Dataset(_examples(source, x, counts), labels)


def _load_arrays(path: Path) -> tuple[Array, Array | None]:
    loaded = _read(path, lambda: np.load(path, mmap_mode="r"))
    if isinstance(loaded, np.ndarray):
        return loaded, None
    with loaded:
        names = [name for name in loaded.files if f"{name}.npy" in loaded.zip.namelist()]
        if {"format", "shape", "data"} <= set(names):
            return _load_sparse(path), None
        for x, y in _NAMES:
            if x in names:
                return _array(path, loaded, x), _array(path, loaded, y) if y in names else None
        if len(names) == 1:
            return _array(path, loaded, names[0]), None
    if not names:
        raise ValueError(f"{path} holds no arrays; want an .npz or .npy file of numbers")
    raise ValueError(f"{path} holds the arrays {names}; want one named 'x', or a single one")


def _array(path: Path, archive: Any, name: str) -> Array:
    found: Array = _read(path, lambda: archive[name], f", array {name!r}")
    return found


def _read(path: Path, read: Callable[[], Any], part: str = "") -> Any:
    try:
        return read()
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a damaged file gives any of a dozen types
        kind = ".h5ad" if path.suffix == ".h5ad" else ".npz or .npy"
        raise ValueError(
            f"{path}{part} is not readable; want an {kind} file of numbers, not damaged and "
            "without Python objects"
        ) from error


def _load_sparse(path: Path) -> Array:
    from scipy import sparse  # which scikit-learn needs too

    matrix: Array = _read(path, lambda: sparse.load_npz(path).toarray())
    return matrix


def _load_anndata(path: Path) -> Array:
    try:
        import anndata
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} needs anndata; want pip install 'fastvae-kernels[counts]'"
        ) from None
    data = _read(path, lambda: anndata.read_h5ad(path))
    x = data.layers.get("counts", data.X)
    return np.asarray(x.toarray() if hasattr(x, "toarray") else x)


def _examples(name: str, x: Array, counts: bool = False) -> Tensor:
    """The array as float32 examples, channels first; a copy unless it is that already."""
    is_image = x.ndim == 3 or (x.ndim == 4 and (x.shape[1] in (1, 3) or x.shape[3] in (1, 3)))
    if not (is_image or x.ndim == 2) or x.shape[0] < 2 or x.size == 0:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; want [N, D], [N, H, W], [N, C, H, W] or "
            "[N, H, W, C] with N of 2 or more and C of 1 or 3"
        )
    if x.ndim == 4 and x.shape[3] in (1, 3):
        if x.shape[1] in (1, 3):
            raise ValueError(
                f"{name} has shape {list(x.shape)}, [N, C, H, W] or [N, H, W, C]; want channels "
                "that can be told from height and width, which are not 1 or 3"
            )
        x = np.moveaxis(x, 3, 1)
    if np.iscomplexobj(x) or not (np.issubdtype(x.dtype, np.number) or x.dtype == np.bool_):
        wanted = "counts" if counts else "uint8, bool or floating-point"
        raise ValueError(f"{name} has dtype {x.dtype}; want {wanted}")
    if not counts and np.issubdtype(x.dtype, np.integer) and x.dtype != np.uint8:
        raise ValueError(
            f"{name} has dtype {x.dtype}; want uint8, bool or floating-point, or a likelihood of "
            "counts"
        )
    if x.dtype == np.uint8 and not counts:
        x = np.divide(x, np.float32(255), out=np.empty(x.shape, np.float32))
    with np.errstate(over="ignore"):  # what is too large for float32 is reported below
        x = np.require(x, np.float32, ["C", "W"])
    parts = (x[start : start + 4096] for start in range(0, len(x), 4096))  # no mask as large as x
    finite = [np.isfinite(part).reshape(len(part), -1).all(1) for part in parts]
    bad = np.flatnonzero(~np.concatenate(finite))
    if bad.size:
        raise ValueError(
            f"{name} has NaN or infinite values in {bad.size} of {len(x)} examples, the first at "
            f"index {bad[0]}; want finite numbers"
        )
    return torch.from_numpy(x)
