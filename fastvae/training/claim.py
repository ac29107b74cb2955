"""A folder of a run belongs to one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["held", "new_folder"]

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


def new_folder(path: Path) -> Path:
    """`path`, or path-2, path-3 and so on, whichever this call is the first to make."""
    folder, number = path, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within it no other process can hold the folder; the system lets go when this one dies.

    The folder itself is locked, so that no file of the lock's is left in it. Where there is no
    such lock (Windows, some network file systems), nothing is held.

    Raises:
        ValueError: another process has it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"is {folder}, in use by {_owner(folder)}; want another folder, or to wait"
            ) from None
        except OSError:
            pass  # no locks here
        yield
    finally:
        os.close(descriptor)


def _owner(folder: Path) -> str:
    inode = str(folder.stat().st_ino)
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:  # not on Linux
        locks = []
    owners = [fields[4] for fields in locks if fields[5].rpartition(":")[2] == inode]
    return f"process {owners[0]}" if owners else "another process"
