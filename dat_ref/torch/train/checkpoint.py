"""Checkpoints that are there whole or not at all, and are never executed.

A file is a mark, the SHA-256 of what follows, and what follows: what `torch.save` writes. It is written beside its
place, forced to disk and moved there; so whenever a run is stopped, the files with their proper names are whole. The
last two are kept. One that was damaged all the same is refused by name, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ..._checks import CheckpointError
from ...state_files import atomic_write

MAGIC = b"dat_ref run 1\n"
KEEP_LAST = 2
_NAME = re.compile(r"step-(\d{8})\.ckpt")
_RENAMED = {"recipe": "config", "average": "ema"}  # fields of checkpoints of an earlier version
_PARTIAL = re.compile(r"\.(step-\d{8}\.ckpt|best\.safetensors|(?:train_config|recipe)\.json|log\.csv)\.\d+\.partial")


def save(folder: Path, step: int, state: dict[str, Any]) -> bool:
    """Write a checkpoint and remove those that are older than the last two.

    Returns:
        whether it could be written. If not (a full disk), what was there stays, and a warning says so.
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
    """Write a file whole or not at all.

    Raises:
        OSError: if there is no room; nothing is left behind, and what was at the place before stays.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def remove_partial(folder: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    for each in folder.iterdir():
        if _PARTIAL.fullmatch(each.name):
            each.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the oldest first."""
    return sorted(each for each in folder.glob("step-*.ckpt") if _NAME.fullmatch(each.name))


def load(path: Path) -> dict[str, Any]:
    """Return what `save` was given.

    Raises:
        CheckpointError: if the file is not whole.
    """
    content = path.read_bytes()
    start = len(MAGIC) + 32
    payload = memoryview(content)[start:]
    if content[: len(MAGIC)] != MAGIC or hashlib.sha256(payload).digest() != content[len(MAGIC) : start]:
        raise CheckpointError(f"{path}: damaged or cut short, its checksum does not fit")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return {_RENAMED.get(name, name): value for name, value in state.items()}


def load_latest(folder: Path) -> dict[str, Any] | None:
    """Return the last checkpoint that is whole, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: if there are some, and none is whole.
    """
    files = list_checkpoints(folder)
    for path in reversed(files):
        try:
            return load(path)
        except CheckpointError as error:  # noqa: PERF203 - there are two
            warnings.warn(f"{error}; the one before it is used", stacklevel=3)
    if files:
        raise CheckpointError(f"{folder}: none of its {len(files)} checkpoints is whole; start anew in another folder")
    return None
