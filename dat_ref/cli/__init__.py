"""The ``dat-ref`` command.

Each subcommand is a module with ``add_parser(subparsers)`` and ``run(arguments) -> exit code``. Exit codes: 0
done, 1 a check did not hold, 2 the input cannot be used (the message says what is wrong and how to mend it).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import agree, bench, check, claims, complexity, convert, evaluate, explain, train


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and all its subcommands."""
    parser = argparse.ArgumentParser(
        prog="dat-ref", description="Deformable attention (DAT, DAT++): see it, check it, use it."
    )
    parser.add_argument("--version", action="version", version=f"dat-ref {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (explain, agree, check, complexity, claims, bench, convert, train, evaluate):
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"dat-ref: error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dat-ref: stopped", file=sys.stderr)
        return 130


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
