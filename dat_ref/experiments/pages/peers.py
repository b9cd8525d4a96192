"""The page "Another attention in its place"."""

from __future__ import annotations

from ..models import BASE, NO_OFFSETS
from .formatting import (
    Results,
    accuracy,
    difference,
    format_difference,
    format_seeds,
    format_share,
    join_names,
    names_in_part,
    significant_sign,
    table,
)

INTRODUCTION = """\
# Another attention in its place

The deformable layers of [the small network](index.md#the-small-network) are replaced, all three of them, by each
attention that it is compared with, [matched](../peers/in-its-place.md) in keys of a query: 36 in the first stage
and 9 in the second, or as near to that as a peer comes (`multi_head` sees the whole map, 144 and 36). Everything
else is the same: stem, MLPs, recipe, scenes, seeds.
"""

COSTS = """\
![Accuracy of each network, a dot for each seed](../images/experiments/peers.svg){{ width="860" }}

Accuracy on {held_out} held-out scenes, mean over seeds with its 95 % interval (Student's t; of the difference
to deformable attention, Welch's), {seeds}. Multiply-adds are those of one image, forward, bilinear reads included.
Memory is the most that a training step takes beside what was there before; time is its median, {batch_size} images,
{machine}.
"""

READING = """\
Three things to keep in mind. The recipe was chosen with deformable attention in mind and tuned for none of them.
Matching keys leaves parameters and multiply-adds apart: `deform_conv` has a full convolution over its taps and
three times the parameters, `pyramid` a strided convolution for its keys. And three seeds leave wide intervals: what
is within them is undecided, not equal.

```bash
python -m dat_ref.experiments.study runs --jobs 2 --only deformable window   # train some of them
python -m dat_ref.experiments.costs                                          # what they cost
```
"""


def names(study: Results) -> list[str]:
    """Return the networks of the table: deformable, at rest, then the peers."""
    return [BASE, NO_OFFSETS, *names_in_part(study, "peers")]


def sides(study: Results) -> dict[int, list[str]]:
    """Return which peers are worse (-1), better (1), or neither outside the interval (0)."""
    names_by_sign: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for name in names_in_part(study, "peers"):
        names_by_sign[significant_sign(difference(study, name, BASE))].append(f"`{name}`")
    return names_by_sign


def verdict(study: Results) -> str:
    """Return what the table says, in a sentence or two."""
    by_sign = sides(study)
    parts = [
        f"{join_names(by_sign[side])} {'is' if len(by_sign[side]) == 1 else 'are'} {what}"
        for side, what in ((1, "more accurate"), (-1, "less accurate"), (0, "not told apart from it"))
        if by_sign[side]
    ]
    return f"**Against deformable attention, on these scenes: {'; '.join(parts)}.**"


def row(results: Results, name: str) -> list[str]:
    """Return a network's row."""
    study, cost = results["study"], results["costs"]["networks"][name]
    base = results["costs"]["networks"][BASE]["seconds"]
    return [
        f"`{name}`",
        format_share(accuracy(study, name)),
        "" if name == BASE else format_difference(difference(study, name, BASE), 100),
        f"{cost['parameters'] / 1e3:.0f} k",
        f"{cost['macs'] / 1e6:.2f} M",
        "" if cost["bytes"] is None else f"{cost['bytes'] / 1e6:.0f} MB",
        f"{1e3 * cost['seconds']:.0f} ms ({cost['seconds'] / base:.2f}×)",
    ]


def page(results: Results) -> str:
    """Return the page."""
    study, costs = results["study"], results["costs"]
    head = ["attention", "accuracy", "against deformable", "parameters", "multiply-adds", "memory", "step"]
    costs_text = COSTS.format(
        held_out=study["held_out"],
        seeds=format_seeds({name: study["runs"][name] for name in names(study)}),
        batch_size=costs["batch_size"],
        machine=costs["machine"],
    )
    rows = table(head, (row(results, name) for name in names(study)))
    return "\n".join((INTRODUCTION, verdict(study) + "\n", costs_text, rows, READING))
