"""What a run tells: a table of every step on disk, a line with loss, rate and time left on the terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from .checkpoint import write

FIELDS = ("step", "epoch", "loss", "learning_rate", "held_out_loss", "held_out_accuracy")


class Log:
    """A CSV file with a row for each step; of a run that was stopped, rows after the checkpoint are taken out.

    Args:
        path: of the file.
        step: rows from this step on are not kept.
        tensorboard: whether to write events for TensorBoard beside it, if the package is there.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool = False) -> None:
        kept = [row for row in rows(path) if row["step"] < step]
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write(path, text.getvalue().encode())
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, FIELDS, lineterminator="\n")
        self._events = _events(path.parent) if tensorboard else None

    def add(self, **row: Any) -> None:
        """Add a row; it is on disk when this returns, short of a power cut."""
        self._writer.writerow(row)
        self._file.flush()
        if self._events is not None:
            for name in FIELDS[2:]:
                if name in row:
                    self._events.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, as numbers; a last line that was cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [
        {name: (int if name in ("step", "epoch") else float)(value) for name, value in row.items() if value}
        for row in csv.DictReader(io.StringIO(whole))
    ]


def _events(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
