"""Checkpoint files: written atomically, verified by a checksum, never executed.

A file consists of a magic string, the SHA-256 of the payload, and the payload that `torch.save` writes. It is written
under a temporary name next to its final name, forced to disk and renamed. So files with their final names are complete,
whenever a run is stopped. The last two checkpoints are kept. A damaged one is reported by name and the one before it is
used.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ..._checks import CheckpointError
from ...state_files import RUN_MAGIC as MAGIC
from ...state_files import atomic_write

KEEP_LAST = 2
_NAME = re.compile(r"step-(\d{8})\.ckpt")
_RENAMED = {"recipe": "config", "average": "ema"}  # fields of checkpoints of an earlier version
_PARTIAL = re.compile(r"\.(step-\d{8}\.ckpt|best\.safetensors|(?:train_config|recipe)\.json|log\.csv)\.\d+\.partial")


def save(folder: Path, step: int, state: dict[str, Any]) -> bool:
    """Write a checkpoint and remove all but the last two.

    Returns:
        True if the checkpoint was written. Otherwise (disk full) a warning is given and the earlier files stay.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path = folder / f"step-{step:08d}.ckpt"
    try:
        write_atomic(path, MAGIC, hashlib.sha256(payload).digest(), payload)
    except OSError as error:
        warnings.warn(f"{path}: could not be written ({error.strerror}); the checkpoint before it stays", stacklevel=2)
        return False
    for outdated in list_checkpoints(folder)[:-KEEP_LAST]:
        outdated.unlink(missing_ok=True)
    return True


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file completely or not at all.

    Raises:
        OSError: if the file cannot be written; it names `path`. Nothing is left behind, and an earlier file stays.
    """
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # without a name, or with the temporary name
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_partial(folder: Path) -> None:
    """Remove the temporary files that a killed run left behind."""
    for each in folder.iterdir():
        if _PARTIAL.fullmatch(each.name):
            each.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the oldest first."""
    return sorted(each for each in folder.glob("step-*.ckpt") if _NAME.fullmatch(each.name))


def latest_step(folder: Path) -> int:
    """Return the number of steps before the last checkpoint in a folder; 0 if there is none."""
    return max((int(each.stem.removeprefix("step-")) for each in list_checkpoints(folder)), default=0)


def load(path: Path) -> dict[str, Any]:
    """Return the state that was given to `save`.

    Raises:
        CheckpointError: if the file is damaged, or its content is not a state of tensors and plain values.
    """
    content = path.read_bytes()
    start = len(MAGIC) + 32
    payload = memoryview(content)[start:]
    if content[: len(MAGIC)] != MAGIC or hashlib.sha256(payload).digest() != content[len(MAGIC) : start]:
        raise CheckpointError(f"{path}: damaged or cut short, its checksum does not fit")
    try:
        state: Any = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a mapping of fields, got {type(state).__name__}")
    return {str(_RENAMED.get(name, name)): value for name, value in state.items()}


def load_latest(folder: Path) -> dict[str, Any] | None:
    """Return the state in the last checkpoint that can be read; None if there are no checkpoints.

    Raises:
        CheckpointError: if there are checkpoints and none can be read.
    """
    files = list_checkpoints(folder)
    for path in reversed(files):
        try:
            return load(path)
        except CheckpointError as error:  # noqa: PERF203 - there are two
            warnings.warn(f"{error}; the one before it is used", stacklevel=3)
    if files:
        raise CheckpointError(f"{folder}: none of its {len(files)} checkpoints is whole; start again in another folder")
    return None
