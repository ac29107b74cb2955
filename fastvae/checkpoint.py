"""Files that are whole at any moment: checkpoints, metrics, reports, results."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["load", "save", "write_csv", "write_json", "write_text"]

_FORMAT = "fastvae train, 1"  # raised when older checkpoints cannot be read any more


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, and lists and dicts of them."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    _write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, with all tensors on the CPU.

    Raises:
        ValueError: there is no such file, or it is not a checkpoint of `save`.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; want the checkpoint of an earlier run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file gives any of a dozen types
        raise ValueError(f"{path} is damaged or no checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version of `fastvae train`")
    return state


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
    """Write a table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write numbers, strings, and lists and dicts of them."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    _write_atomically(path, text.encode())


def _write_atomically(path: Path, content: bytes) -> None:
    """Whoever opens `path`, also after a crash, finds the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
