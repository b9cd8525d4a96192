"""Terminal side of the command: output on any encoding, parser and help format, folders, text files."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from .._checks import ConfigError, printable

# ------------------------------------------------------------------------------------------------ encodings

ERROR_HANDLER = "dat_ref.ascii"
# Replacements for the symbols that the command prints, where the encoding of the output lacks them.
_ASCII = {
    "×": "x", "·": ".", "→": "->", "↔": "<->", "–": "-", "—": "-", "−": "-", "…": "...", "✓": "ok", "✗": "FAIL",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "±": "+-", "√": "sqrt", "∞": "inf", "Σ": "sum", "²": "^2", "³": "^3",
    "½": "1/2", "α": "alpha", "β": "beta", "π": "pi", "⌊": "floor(", "⌋": ")", "∈": "in", "⊙": "*", "‖": "||",
    "“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "\u202f": " ", "µ": "u",
    **dict(zip("⁰¹⁴⁵⁶⁷⁸⁹", ("^0", "^1", "^4", "^5", "^6", "^7", "^8", "^9"))),
    **dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789")),
}  # fmt: skip


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that cannot be encoded; bytes of a file name that are not UTF-8 become ``\\xff``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    escaped = (f"\\x{ord(each) - 0xDC00:02x}" if "\udc80" <= each <= "\udcff" else each for each in text)
    return "".join(_ASCII.get(each, each if each.isascii() else "?") for each in escaped), error.end


codecs.register_error(ERROR_HANDLER, _to_ascii)


@contextmanager
def any_encoding() -> Iterator[None]:
    """Print on streams of any encoding: characters that a stream cannot encode get an ASCII replacement."""
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)  # absent in notebooks, None without a stream
            if reconfigure is not None:
                stack.callback(_set_errors, reconfigure, stream.errors)
                _set_errors(reconfigure, ERROR_HANDLER)
        yield


def _set_errors(reconfigure: Callable[..., None], errors: str | None) -> None:
    with suppress(OSError, ValueError):  # reconfiguring flushes, which fails if the pipe is closed or the disk is full
        reconfigure(errors=errors)


# ------------------------------------------------------------------------------------------------ parser


class HelpFormatter(argparse.HelpFormatter):
    """Help format that wraps the description and keeps the lines of an epilog ``example:``."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


# ------------------------------------------------------------------------------------------------ files


def make_folder(folder: Path, option: str = "--out") -> None:
    """Create a folder for output, with its parents.

    Raises:
        ConfigError: if a file has its name or the name of a parent.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((path for path in (folder, *folder.parents) if path.is_file()), folder)
        raise ConfigError(f"{option}: expected a folder, and {file} is a file") from error


def read_text(path: Path, option: str) -> str:
    """Read a UTF-8 text file.

    Raises:
        ConfigError: if it is not UTF-8.
        OSError: if it cannot be opened or read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: expected a text file in UTF-8, cannot read {path}: {error}") from error


def read_json(path: Path, option: str) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: if it is not JSON, nested too deeply, or contains a number with too many digits.
        OSError: if it cannot be opened or read.
    """
    text = read_text(path, option)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{option}: expected JSON, {path} is nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{option}: expected JSON, cannot read {path}: {error}") from error
