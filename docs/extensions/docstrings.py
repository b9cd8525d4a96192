"""Docstrings as Markdown: fence doctests and tables, replace ``::`` at the end of a line by a colon."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +.*)*", re.MULTILINE)

TABLE = re.compile(r"^(=+(?: +=+)+)\n(?:.*\n)*?\1\n(?:(?:.+\n)+?\1(?:\n|$))?", re.MULTILINE)


def to_markdown(docstring: str) -> str:
    """Return a docstring with its doctests and its tables (drawn with ``=``) in fences.

    A doctest starts at `>>>` and ends at a blank line, as in the doctest module.
    """

    def fenced(example: re.Match[str]) -> str:
        return f"{example[1]}```pycon\n{example[0]}\n{example[1]}```"

    docstring = TABLE.sub(lambda table: f"```text\n{table[0].rstrip()}\n```\n", docstring)
    return DOCTEST.sub(fenced, re.sub(r"::$", ":", docstring, flags=re.MULTILINE))


class Docstrings(griffe.Extension):
    """Apply `to_markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Convert the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
