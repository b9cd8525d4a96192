"""The page "One thing changed"."""

from __future__ import annotations

from ..small import BASE
from .words import Found, accuracy, difference, of_part, outside, seeds_told, share, signed, table

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


def told_apart(study: Found, part: str) -> str:
    """Return which changes of a part matter, as far as the seeds tell."""
    names = of_part(study, part)
    words = {1: "better", -1: "worse"}
    apart = {name: outside(difference(study, name, BASE)) for name in names}
    found = [f"`{name}` is {words[side]}" for name, side in apart.items() if side]
    if not found:
        return "**No difference outside the interval.**"
    rest = "" if len(found) == len(names) else "; the others are not told apart"
    return f"**{', '.join(found)}{rest}.**"


def section(study: Found, part: str) -> str:
    """Return a part of the page."""
    title, about = PARTS[part]
    names = [BASE, *of_part(study, part)]
    rows = (
        [
            f"`{name}`",
            study["about"][name]["about"],
            share(accuracy(study, name)),
            "" if name == BASE else signed(difference(study, name, BASE), 100),
        ]
        for name in names
    )
    made = table(["network", "what is changed", "accuracy", "difference"], rows, left=2)
    return f"## {title}\n\n{about}\n\n{told_apart(study, part)}\n\n{made}"


def page(found: Found) -> str:
    """Return the page."""
    study = found["study"]
    names = [BASE, *(name for part in PARTS for name in of_part(study, part))]
    seeds = seeds_told({name: study["runs"][name] for name in names})
    introduction = INTRODUCTION.format(held_out=study["held_out"], seeds=seeds)
    return "\n".join((introduction, *(section(study, part) for part in PARTS)))
