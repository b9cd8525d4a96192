"""What a run tells: a table of every step on disk, a line with loss, rate and time left on the terminal."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import Any

from ..._checks import ConfigError
from .checkpoint import write_atomic

FIELDS = ("step", "epoch", "loss", "learning_rate", "held_out_loss", "held_out_accuracy")


class Log:
    """A CSV file with a row for each step; of a run that was stopped, rows after the checkpoint are taken out.

    Args:
        path: of the file.
        step: rows from this step on are not kept.
        tensorboard: whether to write events for TensorBoard beside it.

    Raises:
        ConfigError: if the package that writes events is missing.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool = False) -> None:
        self._path = path
        self._events = _summary_writer(path.parent, step) if tensorboard else None
        previous = [row for row in read_rows(path) if row["step"] < step]
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(previous)
        write_atomic(path, text.getvalue().encode())
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, FIELDS, lineterminator="\n")

    def add(self, **row: Any) -> None:
        """Add a row; it is on disk when this returns, short of a power cut and a full disk.

        On a full disk a warning says so, and the row is written with the next one for which there is room.
        """
        self._writer.writerow(row)
        try:
            self._file.flush()
        except OSError as error:
            self._warn(error)
        if self._events is not None:
            for name in FIELDS[2:]:
                if name in row:
                    self._events.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        """Close the files."""
        try:
            self._file.close()
        except OSError as error:
            self._warn(error)
        if self._events is not None:
            self._events.close()

    def _warn(self, error: OSError) -> None:
        warnings.warn(f"{self._path}: could not be written ({error.strerror}); the run goes on", stacklevel=3)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, as numbers; a last line that was cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [
        {name: (int if name in ("step", "epoch") else float)(value) for name, value in row.items() if value}
        for row in csv.DictReader(io.StringIO(complete))
    ]


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is needed to write its events: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step)  # type: ignore[no-untyped-call]
