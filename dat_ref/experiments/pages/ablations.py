"""The page "One thing changed"."""

from __future__ import annotations

from ..models import BASE
from .formatting import (
    Results,
    accuracy,
    difference,
    format_difference,
    format_seeds,
    format_share,
    names_in_part,
    significant_sign,
    table,
)

INTRODUCTION = """\
# One thing changed

[The small network](index.md#the-small-network), with one of its options changed in all three deformable layers.
Accuracy on {held_out} held-out scenes, mean over seeds with its 95 % interval (Student's t), {seeds}; and the
difference to the network as it is, with its own (Welch's t). Of so many comparisons one is expected to lie outside of
its interval by chance.

![Accuracy of each network, a dot for each seed](../images/experiments/ablations.svg){{ width="860" }}
"""

PARTS = {
    "offsets": ("Offsets", "How far points may go, where they begin, and whether they move at all."),
    "groups": ("Groups", "How many sets of points a layer has; the network as it is has two."),
    "bias": ("Position bias", "What tells attention where a key lies; the network as it is reads a table."),
    "conventions": (
        "Conventions: does half a cell matter?",
        "[The four ideas](../conventions.md) of where a cell is; the network as it is takes cell centers. They shift "
        "the points by up to half a key cell against the features, and stretch the table's coordinates.",
    ),
}


def significant_changes(study: Results, part: str) -> str:
    """Return which changes of a part matter, as far as the seeds tell."""
    names = names_in_part(study, part)
    words = {1: "better", -1: "worse"}
    signs = {name: significant_sign(difference(study, name, BASE)) for name in names}
    changes = [f"`{name}` is {words[side]}" for name, side in signs.items() if side]
    if not changes:
        return "**No difference outside the interval.**"
    rest = "" if len(changes) == len(names) else "; the others are not told apart"
    return f"**{', '.join(changes)}{rest}.**"


def section(study: Results, part: str) -> str:
    """Return a part of the page."""
    title, about = PARTS[part]
    names = [BASE, *names_in_part(study, part)]
    rows = (
        [
            f"`{name}`",
            study["variants"][name]["description"],
            format_share(accuracy(study, name)),
            "" if name == BASE else format_difference(difference(study, name, BASE), 100),
        ]
        for name in names
    )
    made = table(["network", "what is changed", "accuracy", "difference"], rows, left=2)
    return f"## {title}\n\n{about}\n\n{significant_changes(study, part)}\n\n{made}"


def page(results: Results) -> str:
    """Return the page."""
    study = results["study"]
    names = [BASE, *(name for part in PARTS for name in names_in_part(study, part))]
    seeds = format_seeds({name: study["runs"][name] for name in names})
    introduction = INTRODUCTION.format(held_out=study["held_out"], seeds=seeds)
    return "\n".join((introduction, *(section(study, part) for part in PARTS)))
