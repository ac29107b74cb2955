"""Files that are whole at any moment."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["write_bytes", "write_csv", "write_json", "write_text"]


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
    """Write a table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write numbers, strings, and lists and dicts of them; NaN and infinities, for which JSON has
    no word, as null."""
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Whoever opens `path`, also after a crash, finds the old content or the new, never a part.

    Raises:
        OSError: it cannot be written, such as on a full disk; the error names the path.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()  # a part, for which there may be no room
        raise OSError(error.errno, error.strerror, str(path)) from error
