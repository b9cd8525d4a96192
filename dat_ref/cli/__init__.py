"""The ``dat-ref`` command.

Each subcommand is a module with ``add_parser(subparsers)`` and ``run(arguments) -> exit code``. Exit codes:

- 0: done;
- 1: a check, comparison or training failed;
- 2: the input cannot be used (the message names the problem and a remedy);
- 3: an error in the command itself (the traceback is printed);
- 130: interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from .. import __version__
from .._checks import printable
from . import agree, bench, check, claims, complexity, convert, diagnose, evaluate, explain, suggest, train
from .output import CommandParser, HelpFormatter, any_encoding

# Exceptions that bad input, a missing package or the machine can cause. All others are errors of ours.
_EXPECTED = (ValueError, OSError, ImportError, MemoryError, OverflowError, RecursionError)
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and all its subcommands."""
    parser = CommandParser(
        prog="dat-ref",
        description="Deformable attention (DAT, DAT++): visualize it, verify it, use it.",
        epilog="example:\n  dat-ref explain photo.jpg --model dat_tiny --checkpoint dat_tiny.pth",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dat-ref {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (explain, agree, check, complexity, claims, bench, convert, train, evaluate, diagnose, suggest):
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with any_encoding():
        code = 0
        try:
            options = build_parser().parse_args(arguments)
            code = int(options.run(options))
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader, for example `head`, has closed the pipe
            _discard_output()
        except KeyboardInterrupt:
            print("dat-ref: interrupted", file=sys.stderr)
            code = 130
        except Exception as error:
            code = _report(error, sys.argv[1:] if arguments is None else arguments)
        return code


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Print an exception and return the exit code: one line if it is expected, else a traceback."""
    if isinstance(error, OSError) and error.filename is None and not _output_works():
        print(f"dat-ref: error: standard output: {error.strerror or error}", file=sys.stderr)
        return 2
    if isinstance(error, _EXPECTED) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        message = _message(error)
        for argument in filter(None, arguments):  # a file name with a line break does not break the message
            message = message.replace(argument, printable(argument))
        print(f"dat-ref: error: {message}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(
        f"dat-ref: internal error ({type(error).__name__}). Please report it with the command line and the traceback "
        f"above (dat-ref {__version__})",
        file=sys.stderr,
    )
    return 3


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
        return f"{printable(name)}: {error.strerror}"
    if isinstance(error, RecursionError):
        return f"the input is nested too deeply ({error})"
    if isinstance(error, OverflowError):
        return f"a number in the input is too large ({error})"
    if isinstance(error, MemoryError):
        return str(error) or "not enough memory"
    return str(error) or type(error).__name__


def _output_works() -> bool:
    """Write a line break to standard output. If that fails, discard the rest of the output and return False."""
    try:
        if sys.stdout is not None:
            print(flush=True)
    except OSError:
        _discard_output()
        return False
    return True


def _discard_output() -> None:
    """Send standard output to the null device, so that flushing at the end of the process does not fail again."""
    with suppress(OSError, ValueError):  # a stream without a file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
