"""Checkpoints of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import write_bytes

__all__ = ["load", "save"]

_FORMAT = "fastvae train, 1"  # raised when older checkpoints cannot be read any more


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, and lists and dicts of them."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    write_bytes(path, buffer.getvalue())


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
