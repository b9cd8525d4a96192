"""The page "Do the points move to the objects?"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..._checks import Array
from ..measures import apart
from ..small import BASE, SEVERAL, STILL
from .words import Found, in_layers, listed, outside, over_seeds, seeds_told, share, signed, table

INTRODUCTION = """\
# Do the points move to the objects?

The article shows three things in pictures: points contract onto the targets, they are denser on them in deeper
stages, and where there are several targets, separate groups of points go to them. Here each is a measurement, on
[the small network](index.md#the-small-network): the mask of every object is known. Intervals are over seeds (95 %,
Student's t; of two networks' difference, Welch's), {seeds}; each run's number is a mean over {scenes} held-out scenes.
"""

CONTRACT = """\
## Do they contract onto the object?

The share of a layer's points on the object; the share of the same points on another scene's object, by chance, which
tells a shift to where objects are more often from one to where this one is; the share at rest; how much farther from
the object the moved ones are (mean distance to its nearest pixel, in pixels of the image; below 0 is nearer); what
share of the layer's attention the points on the object get; how far points move; and what share of that is one shift
of each group, the same for all scenes and places.
"""

GROUPS = """\
### By group

Groups have no order of their own from one seed to the next: in each run the first one here is the one with more of
its points on the object, so that a difference between the two is partly that choice.
"""

NETWORKS = """\
### In other networks

The same in the changed networks of [One thing changed](ablations.md): points on the object minus those at rest, in
percentage points, and the attention they get.
"""

LEARNING = """\
## While it learns

![Points and attention on the object over training, a line for each seed][learning]{ width="860" }

[learning]: ../images/experiments/learning.svg
"""

DEEPER = """\
## Are they denser in deeper stages?

Points on the object for one at rest, by stage. More than 1 is denser than the grid.
"""

OBJECTS = """\
## Do separate groups go to separate objects?

The small network, trained twice as long on scenes with one to four objects to name all of them. On scenes with two
or more, each object falls to the group whose point is nearest, or to the one that attends to it most; a pair of
objects is separate if they fall to different groups. By chance that happens as often as for two objects of
different scenes.
"""

SWIN = """\
## Attention against windows

The same queries, the pixels of each layer's map on an object and all others: how far they attend (Σ of attention
times distance, in pixels of the image), and how much of their attention lies on the object; "even" is the same
share if a query attended alike to all keys that it sees. Queries elsewhere that find the object from afar are what
windows cannot have.
"""


def layers(found: Found) -> list[str]:
    """Return the names of the layers, from the first on."""
    return list(next(iter(found["looks"]["points"][BASE].values())))


def of_layer(runs: Found, layer: str, measure: str) -> list[float]:
    """Return each run's value, the mean over groups."""
    return [float(np.mean([group[measure] for group in run[layer]])) for run in runs.values()]


def gained(runs: Found, layer: str, than: str = "at_rest") -> dict[str, float]:
    """Return points on the object minus those at rest, or minus those by chance, over seeds."""
    return over_seeds(np.subtract(of_layer(runs, layer, "points"), of_layer(runs, layer, than)))


def farther(runs: Found, layer: str) -> dict[str, float]:
    """Return how much farther from the object points are than at rest, over seeds."""
    return over_seeds(np.subtract(of_layer(runs, layer, "distance"), of_layer(runs, layer, "distance_at_rest")))


def contract_verdict(found: Found) -> str:
    """Return whether the points contract onto the object."""
    runs = found["looks"]["points"][BASE]
    both = {layer: [outside(gained(runs, layer, than)) for than in ("at_rest", "by_chance")] for layer in layers(found)}
    sides = {layer: each[0] if each[0] == each[1] else 0 for layer, each in both.items()}
    if all(side > 0 for side in sides.values()):
        told = "**More points lie on the object than at rest, and than by chance, in every layer.**"
    else:
        where = in_layers(sides, "more of them lie on it than at rest, and than by chance,", "fewer")
        told = f"**That points contract onto the object in every layer is not reproduced:** {where}."
    away = [layer for layer in layers(found) if outside(farther(runs, layer)) > 0]
    if not away:
        return told
    where = "every layer" if away == layers(found) else listed(away)
    return f"{told} On average, though, points are farther from it than at rest in {where}."


def contract_table(runs: Found) -> str:
    """Return where the points of each layer are."""

    def row(layer: str) -> list[str]:
        shares = [share(over_seeds(of_layer(runs, layer, name))) for name in ("points", "by_chance", "at_rest")]
        attention = share(over_seeds(of_layer(runs, layer, "attention")))
        moved = f"{np.mean(of_layer(runs, layer, 'moved')):.1f} px"
        shift = f"{np.mean(of_layer(runs, layer, 'one_shift')):.0%}"
        return [layer, *shares, signed(farther(runs, layer)), attention, moved, shift]

    head = ["layer", "points", "by chance", "at rest", "farther by", "attention", "moved by", "one shift"]
    return table(head, map(row, next(iter(runs.values()))))


def groups_table(runs: Found) -> str:
    """Return each layer's groups, the one with more of its points on the object first."""

    def rows() -> Iterator[list[str]]:
        for layer in next(iter(runs.values())):
            ordered = [sorted(run[layer], key=lambda group: -group["points"]) for run in runs.values()]
            for place, groups in enumerate(zip(*ordered)):
                shares = [share(over_seeds(group[name] for group in groups)) for name in ("points", "attention")]
                yield [layer, ("more", "fewer")[place], *shares]

    return table(["layer", "group", "points", "attention"], rows(), left=2)


def networks_table(found: Found) -> str:
    """Return points minus points at rest, and attention, of all networks that were looked at."""

    def row(name: str, runs: Found) -> list[str]:
        cells = []
        for layer in layers(found):
            attention = over_seeds(of_layer(runs, layer, "attention"))["mean"]
            cells.append(f"{signed(gained(runs, layer), 100)}, {attention:.0%}")
        return [f"`{name}`", *cells]

    return table(["network", *layers(found)], (row(*each) for each in found["looks"]["points"].items()))


def density(runs: Found, stage: str) -> list[float]:
    """Return for each run the points on the object for one at rest, over the layers of a stage."""
    chosen = [layer for layer in next(iter(runs.values())) if layer.startswith(stage)]
    moved = np.mean([of_layer(runs, layer, "points") for layer in chosen], axis=0)
    rest = np.mean([of_layer(runs, layer, "at_rest") for layer in chosen], axis=0)
    return list(moved / rest)


def deeper(found: Found) -> str:
    """Return the verdict on whether the second stage's points are denser on the object than the first's."""
    runs = found["looks"]["points"][BASE]
    first, second = (density(runs, f"stage {number}") for number in (1, 2))
    change = over_seeds(np.subtract(second, first))
    told = {1: "Denser in the deeper stage", -1: "Thinner in the deeper stage", 0: "No difference outside the interval"}
    ratios = [f"{each['mean']:.2f} ± {each['half_width']:.2f}" for each in map(over_seeds, (first, second))]
    by = f"{change['mean']:+.2f} ± {change['half_width']:.2f}"
    return f"**{told[outside(change)]}:** {ratios[0]} in stage 1, {ratios[1]} in stage 2, a change of {by}."


def separation(groups: Found, layer: str, how: str) -> dict[str, float]:
    """Return how much more often than by chance pairs of objects fall to different groups."""
    return over_seeds(run[layer][how]["together"] - run[layer][how]["by_chance"] for run in groups.values())


def several_verdict(found: Found) -> str:
    """Return whether separate groups go to separate objects."""
    groups = found["looks"]["several_groups"][BASE + SEVERAL]
    apart = {layer: outside(separation(groups, layer, "nearest")) for layer in next(iter(groups.values()))}
    more = [layer for layer, side in apart.items() if side > 0]
    fewer = [layer for layer, side in apart.items() if side < 0]
    if more:
        rest = f"; less often in {listed(fewer)}" if fewer else ""
        return f"**The nearest points are of separate groups more often than by chance in {listed(more)}{rest}.**"
    rest = f", and in {listed(fewer)} it is less often" if fewer else ""
    return f"**Not reproduced:** in no layer are the nearest points of separate groups more often than by chance{rest}."


def several_table(found: Found) -> str:
    """Return how often pairs of objects fall to separate groups."""
    groups = found["looks"]["several_groups"][BASE + SEVERAL]

    def row(layer: str) -> list[str]:
        cells = []
        for how in ("nearest", "attends"):
            cells.append(share(over_seeds(run[layer][how]["together"] for run in groups.values())))
            cells.append(f"{np.mean([run[layer][how]['by_chance'] for run in groups.values()]):.1%}")
        return [layer, *cells]

    head = ["layer", "nearest point: separate", "by chance", "most attention: separate", "by chance"]
    return table(head, map(row, next(iter(groups.values()))))


def attention_table(found: Found) -> str:
    """Return where queries on the object and elsewhere attend."""

    def rows() -> Iterator[list[str]]:
        for name, runs in found["looks"]["attention"].items():
            for layer in next(iter(runs.values())):
                cells = []
                for where in ("from_object", "from_elsewhere"):
                    values: dict[str, list[Any]] = {
                        key: [run[layer][where][key] for run in runs.values()]
                        for key in ("distance", "foreground", "even")
                    }
                    cells.append(f"{np.mean(values['distance']):.1f} px")
                    cells.append(f"{share(over_seeds(values['foreground']))} ({np.mean(values['even']):.1%})")
                yield [f"`{name}`", layer, *cells]

    head = ["attention", "layer", "on it: distance", "foreground (even)", "elsewhere: distance", "foreground (even)"]
    return table(head, rows(), left=2)


def found_from_afar(found: Found, layer: str, name: str) -> Array:
    """Return for each run the share of attention from beside the object that lies on it."""
    runs = found["looks"]["attention"][name].values()
    return np.array([run[layer]["from_elsewhere"]["foreground"] for run in runs])


def attention_verdict(found: Found) -> str:
    """Return whether queries beside the object find it more than with shifted windows, and whether offsets do it."""
    sides = {}
    for layer in layers(found):
        ours, still, windows = (found_from_afar(found, layer, name) for name in (BASE, STILL, "shifted_window"))
        sizes = " against ".join(share(over_seeds(each)) for each in (ours, windows))
        at_rest = f"{share(over_seeds(still))} without offsets"
        sides[f"{layer} ({sizes}, {at_rest})"] = outside(apart(ours, windows))
    told = in_layers(sides, "more", "less")
    return f"**Attention of queries beside the object that lies on it, against shifted windows:** {told}."


def page(found: Found) -> str:
    """Return the page."""
    runs = found["looks"]["points"][BASE]
    several = found["looks"]["several_points"][BASE + SEVERAL]
    parts = (
        INTRODUCTION.format(scenes=found["looks"]["scenes"], seeds=seeds_told(found["looks"]["points"])),
        CONTRACT,
        contract_verdict(found) + "\n",
        contract_table(runs),
        GROUPS,
        groups_table(runs),
        NETWORKS,
        networks_table(found),
        LEARNING,
        DEEPER,
        deeper(found) + "\n",
        OBJECTS,
        several_verdict(found) + "\n",
        several_table(found),
        "Where the points of these networks are, all objects of a scene together:\n",
        contract_table(several),
        SWIN,
        attention_verdict(found) + "\n",
        attention_table(found),
    )
    return "\n".join(parts)
