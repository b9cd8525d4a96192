"""Numbers in words: what the pages share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..measures import interval, welch_difference

Results = Mapping[str, Any]
MAX_PLAIN_COLUMNS = 4  # columns that fit beside the contents of a page at full size


def format_difference(estimate: Mapping[str, float], scale: float = 1.0) -> str:
    """Return a difference with its interval."""
    return f"{scale * estimate['mean']:+.1f} ± {scale * estimate['half_width']:.1f}"


def format_share(estimate: Mapping[str, float]) -> str:
    """Return a share with its interval, in percent."""
    return f"{estimate['mean']:.1%} ± {estimate['half_width']:.1%}"


def significant_sign(estimate: Mapping[str, float]) -> int:
    """Return on which side of 0 the whole interval lies: -1, 1, or 0 if it holds 0."""
    mean, half = estimate["mean"], estimate["half_width"]
    return 0 if abs(mean) <= half else (1 if mean > 0 else -1)


def seed_interval(values: Iterable[float]) -> dict[str, float]:
    """Return the mean over runs with its interval."""
    return interval(np.array(list(values)))


def accuracy(study: Results, name: str) -> dict[str, float]:
    """Return a network's accuracy over its seeds."""
    return seed_interval(run["accuracy"] for run in study["runs"][name].values())


def difference(study: Results, name: str, base: str) -> dict[str, float]:
    """Return how much more accurate a network is than another."""
    ours, theirs = ([run["accuracy"] for run in study["runs"][each].values()] for each in (name, base))
    return welch_difference(np.array(ours), np.array(theirs))


def format_seeds(runs: Mapping[str, Results]) -> str:
    """Return how many seeds networks have, the usual number first.

    >>> format_seeds({"a": {"0": 1, "1": 2}, "b": {"0": 1}, "c": {"0": 1}})
    '1 of each network, 2 of `a`'
    """
    counts = {name: len(by_seed) for name, by_seed in runs.items()}
    usual = max(counts.values(), key=list(counts.values()).count)
    named = {
        count: join_names([f"`{name}`" for name, each in counts.items() if each == count])
        for count in sorted({*counts.values()} - {usual})
    }
    return ", ".join([f"{usual} of each network", *(f"{count} of {names}" for count, names in named.items())])


def names_in_part(study: Results, part: str) -> list[str]:
    """Return the names of the networks that belong to a part of the pages."""
    return [name for name, each in study["variants"].items() if each["part"] == part]


def format_layers(sides: Mapping[str, int], more: str, fewer: str) -> str:
    """Return which layers lie on which side of 0, see `significant_sign`.

    >>> format_layers({"a": 1, "b": 0, "c": 1}, "more", "fewer")
    'more in a and c; no difference outside the interval in b'
    """
    parts = []
    for side, what in ((1, more), (-1, fewer), (0, "no difference outside the interval")):
        layers = [layer for layer, sign in sides.items() if sign == side]
        if layers:
            parts.append(f"{what} in {join_names(layers)}")
    return "; ".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first `left` columns are words and the others numbers; one of many columns is set small."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    markdown = "\n".join((*lines, *(f"| {' | '.join(row)} |" for row in rows))) + "\n"
    return f'<div class="dense" markdown>\n\n{markdown}\n</div>\n' if len(head) > MAX_PLAIN_COLUMNS else markdown


def join_names(names: Sequence[str]) -> str:
    """Return names in a sentence.

    >>> join_names(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
