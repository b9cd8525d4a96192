"""Log of a run: a CSV file with a row for each step, and optional TensorBoard events."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..._checks import ConfigError
from ..offset_log import PREFIX
from .checkpoint import write_atomic

FIELDS = ("step", "epoch", "loss", "learning_rate", "held_out_loss", "held_out_accuracy")


class Log:
    """CSV file with a row for each step.

    Args:
        path: file; existing rows are kept if they are before `step`.
        step: first step of the rows to come.
        tensorboard: write events for TensorBoard to the same folder.
        offsets: names of the columns for the offsets, see `OffsetLog`.

    Raises:
        ConfigError: if tensorboard is missing, or the file has rows that this class does not write.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool = False, offsets: Sequence[str] = ()) -> None:
        self._path = path
        previous = [row for row in read_rows(path) if row["step"] < step]
        self._fields = tuple(dict.fromkeys([*FIELDS, *offsets, *(name for row in previous for name in row)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, self._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(previous)
        write_atomic(path, text.getvalue().encode())
        self._events = import_summary_writer()(str(path.parent), purge_step=step) if tensorboard else None
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self._fields, lineterminator="\n")

    def add(self, **row: Any) -> None:
        """Add a row and pass it to the operating system.

        If the disk is full, warn, and write the row together with the next one that fits.
        """
        self._writer.writerow(row)
        try:
            self._file.flush()
        except OSError as error:
            self._warn(error)
        if self._events is not None:
            for name in self._fields[2:]:
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
    """Return the rows of a log as numbers, without an incomplete last line.

    Raises:
        ConfigError: if the file was edited such that it cannot be read; the message names the line.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheet programs add a byte order mark
    except UnicodeDecodeError as error:
        raise _log_error(path, "UTF-8 text", str(error)) from error
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if reader.fieldnames is None:
        return []
    if sorted(name for name in reader.fieldnames if not name.startswith(PREFIX)) != sorted(FIELDS):
        raise _log_error(path, f"the columns {','.join(FIELDS)}", ",".join(reader.fieldnames))
    return [_numbers(path, reader.line_num, row) for row in reader]


def _numbers(path: Path, line: int, row: dict[str | Any, Any]) -> dict[str, Any]:
    try:
        numbers = {name: (int if name in ("step", "epoch") else float)(text) for name, text in row.items() if text}
        return {"step": int(row["step"]), **numbers}
    except (TypeError, ValueError) as error:
        cells = ",".join(str(text) for text in row.values())
        raise _log_error(path, f"numbers in line {line}, one for each column", cells) from error


def _log_error(path: Path, expected: str, found: str) -> ConfigError:
    return ConfigError(f"{path}: expected {expected}, got {found!r:.80}; restore the file, or move it away")


def import_summary_writer() -> Any:
    """Return TensorBoard's writer of events.

    Raises:
        ConfigError: if tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is needed to write its events: pip install tensorboard") from error
    return SummaryWriter
