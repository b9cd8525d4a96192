"""Run folder: created on demand, locked for the life of a run.

The lock is a record lock of the operating system on the file ``run.lock``. It ends with its process, so the file that a
killed run leaves behind locks nothing. The file contains the process and the host, for the message of a second run.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..._checks import ConfigError

LOCK_FILE = "run.lock"
_LOCKED = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}  # errors of a lock that another process holds
_held: set[str] = set()  # folders that this process has locked; record locks do not exclude their own process


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` if a folder cannot exist because a file is in its place or in the place of a parent."""
    for each in (folder, *folder.parents):
        if each.exists() and not each.is_dir():
            raise ConfigError(f"{folder}: expected a folder, and {each} is a file")


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder and lock it. At the end unlock it, and remove what was created if it is still empty.

    Raises:
        ConfigError: if another run has locked the folder.
    """
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            yield
    finally:
        for each in created:
            with suppress(OSError):  # it is not empty, or not there
                each.rmdir()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path, name = folder / LOCK_FILE, os.path.realpath(folder)
    if name in _held:
        raise ConfigError(f"{folder}: another run of this process uses the folder")
    descriptor = _open_locked(path)
    _held.add(name)
    try:
        with suppress(OSError):  # disk full: the message of a second run lacks the owner
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        _held.discard(name)
        if sys.platform == "win32":  # an open file cannot be removed
            os.close(descriptor)
            path.unlink(missing_ok=True)
        else:
            with suppress(OSError):
                if os.fstat(descriptor).st_ino == path.stat().st_ino:  # not of another run in a folder made again
                    path.unlink()
            os.close(descriptor)


def _open_locked(path: Path) -> int:
    """Return a descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_descriptor(descriptor)
        except OSError as error:
            if error.errno in _LOCKED:
                owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                raise ConfigError(
                    f"{path.parent}: another run uses the folder ({owner}); wait for it, or choose another folder"
                ) from error
            warnings.warn(
                f"{path.parent}: cannot be locked ({error.strerror}); do not start a second run there", stacklevel=2
            )
            return descriptor
        # The owner may have removed the file between the opening and the locking: the lock is then on no file.
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


def _lock_descriptor(descriptor: int) -> None:
    """Lock a file without waiting. Child processes do not inherit the lock."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # outside the text, which stays readable
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
