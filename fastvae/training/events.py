"""The curves of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["writing"]

_SUFFIX = ".fastvae"  # tells a run's own file from a user's


@contextmanager
def writing(
    folder: Path, history: Sequence[Mapping[str, float]]
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Within it, each row of metrics.csv that the function is given is written at once.

    As metrics.csv is, the file is made anew from the history: after a crash no epoch is lost or
    doubled.
    """
    from torch.utils.tensorboard import SummaryWriter

    for earlier in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
        earlier.unlink()
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:

        def write(row: Mapping[str, float]) -> None:
            for name, value in row.items():
                split, _, metric = name.partition("_")
                if metric:  # train_elbo stands beside heldout_elbo
                    writer.add_scalar(f"{metric}/{split}", value, int(row["epoch"]))
            writer.flush()

        for row in history:
            write(row)
        yield write
