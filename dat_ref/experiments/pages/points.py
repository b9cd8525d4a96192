"""The page "Do the points move to the objects?"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..._checks import Array
from ..measures import welch_difference
from ..models import BASE, MULTI_OBJECT, NO_OFFSETS
from .formatting import (
    Results,
    format_difference,
    format_layers,
    format_seeds,
    format_share,
    join_names,
    seed_interval,
    significant_sign,
    table,
)

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
times distance, in pixels of the image), and how much of their attention lies on the object; "uniform" is the same
share if a query attended alike to all keys that it sees. Queries elsewhere that find the object from afar are what
windows cannot have.
"""


def layers(results: Results) -> list[str]:
    """Return the names of the layers, from the first on."""
    return list(next(iter(results["attention_maps"]["points"][BASE].values())))


def layer_values(runs: Results, layer: str, measure: str) -> list[float]:
    """Return each run's value, the mean over groups."""
    return [float(np.mean([group[measure] for group in run[layer]])) for run in runs.values()]


def points_gain(runs: Results, layer: str, than: str = "reference") -> dict[str, float]:
    """Return points on the object minus those at rest, or minus those by chance, over seeds."""
    return seed_interval(np.subtract(layer_values(runs, layer, "points"), layer_values(runs, layer, than)))


def distance_gain(runs: Results, layer: str) -> dict[str, float]:
    """Return how much farther from the object points are than at rest, over seeds."""
    return seed_interval(
        np.subtract(layer_values(runs, layer, "distance"), layer_values(runs, layer, "reference_distance"))
    )


def contract_verdict(results: Results) -> str:
    """Return whether the points contract onto the object."""
    runs = results["attention_maps"]["points"][BASE]
    both = {
        layer: [significant_sign(points_gain(runs, layer, than)) for than in ("reference", "by_chance")]
        for layer in layers(results)
    }
    sides = {layer: each[0] if each[0] == each[1] else 0 for layer, each in both.items()}
    if all(side > 0 for side in sides.values()):
        sentence = "**More points lie on the object than at rest, and than by chance, in every layer.**"
    else:
        where = format_layers(sides, "more of them lie on it than at rest, and than by chance,", "fewer")
        sentence = f"**That points contract onto the object in every layer is not reproduced:** {where}."
    away = [layer for layer in layers(results) if significant_sign(distance_gain(runs, layer)) > 0]
    if not away:
        return sentence
    where = "every layer" if away == layers(results) else join_names(away)
    return f"{sentence} On average, though, points are farther from it than at rest in {where}."


def contract_table(runs: Results) -> str:
    """Return where the points of each layer are."""

    def row(layer: str) -> list[str]:
        shares = [
            format_share(seed_interval(layer_values(runs, layer, name)))
            for name in ("points", "by_chance", "reference")
        ]
        attention = format_share(seed_interval(layer_values(runs, layer, "attention")))
        moved = f"{np.mean(layer_values(runs, layer, 'displacement')):.1f} px"
        shift = f"{np.mean(layer_values(runs, layer, 'shift_fraction')):.0%}"
        return [layer, *shares, format_difference(distance_gain(runs, layer)), attention, moved, shift]

    head = ["layer", "points", "by chance", "at rest", "farther by", "attention", "moved by", "one shift"]
    return table(head, map(row, next(iter(runs.values()))))


def groups_table(runs: Results) -> str:
    """Return each layer's groups, the one with more of its points on the object first."""

    def rows() -> Iterator[list[str]]:
        for layer in next(iter(runs.values())):
            ordered = [sorted(run[layer], key=lambda group: -group["points"]) for run in runs.values()]
            for rank, groups in enumerate(zip(*ordered)):
                shares = [
                    format_share(seed_interval(group[name] for group in groups)) for name in ("points", "attention")
                ]
                yield [layer, ("more", "fewer")[rank], *shares]

    return table(["layer", "group", "points", "attention"], rows(), left=2)


def networks_table(results: Results) -> str:
    """Return points minus points at rest, and attention, of all networks that were looked at."""

    def row(name: str, runs: Results) -> list[str]:
        cells = []
        for layer in layers(results):
            attention = seed_interval(layer_values(runs, layer, "attention"))["mean"]
            cells.append(f"{format_difference(points_gain(runs, layer), 100)}, {attention:.0%}")
        return [f"`{name}`", *cells]

    return table(["network", *layers(results)], (row(*each) for each in results["attention_maps"]["points"].items()))


def density(runs: Results, stage: str) -> list[float]:
    """Return for each run the points on the object for one at rest, over the layers of a stage."""
    stage_layers = [layer for layer in next(iter(runs.values())) if layer.startswith(stage)]
    moved = np.mean([layer_values(runs, layer, "points") for layer in stage_layers], axis=0)
    reference = np.mean([layer_values(runs, layer, "reference") for layer in stage_layers], axis=0)
    return list(moved / reference)


def density_verdict(results: Results) -> str:
    """Return the verdict on whether the second stage's points are denser on the object than the first's."""
    runs = results["attention_maps"]["points"][BASE]
    first, second = (density(runs, f"stage {number}") for number in (1, 2))
    change = seed_interval(np.subtract(second, first))
    sentence = {
        1: "Denser in the deeper stage",
        -1: "Thinner in the deeper stage",
        0: "No difference outside the interval",
    }
    ratios = [f"{each['mean']:.2f} ± {each['half_width']:.2f}" for each in map(seed_interval, (first, second))]
    by = f"{change['mean']:+.2f} ± {change['half_width']:.2f}"
    return (
        f"**{sentence[significant_sign(change)]}:** {ratios[0]} in stage 1, {ratios[1]} in stage 2, a change of {by}."
    )


def separation(groups: Results, layer: str, how: str) -> dict[str, float]:
    """Return how much more often than by chance pairs of objects fall to different groups."""
    return seed_interval(run[layer][how]["observed"] - run[layer][how]["by_chance"] for run in groups.values())


def multi_object_verdict(results: Results) -> str:
    """Return whether separate groups go to separate objects."""
    groups = results["attention_maps"]["multi_object_groups"][BASE + MULTI_OBJECT]
    signs = {layer: significant_sign(separation(groups, layer, "nearest")) for layer in next(iter(groups.values()))}
    more = [layer for layer, side in signs.items() if side > 0]
    fewer = [layer for layer, side in signs.items() if side < 0]
    if more:
        rest = f"; less often in {join_names(fewer)}" if fewer else ""
        return f"**The nearest points are of separate groups more often than by chance in {join_names(more)}{rest}.**"
    rest = f", and in {join_names(fewer)} it is less often" if fewer else ""
    return f"**Not reproduced:** in no layer are the nearest points of separate groups more often than by chance{rest}."


def multi_object_table(results: Results) -> str:
    """Return how often pairs of objects fall to separate groups."""
    groups = results["attention_maps"]["multi_object_groups"][BASE + MULTI_OBJECT]

    def row(layer: str) -> list[str]:
        cells = []
        for how in ("nearest", "most_attention"):
            cells.append(format_share(seed_interval(run[layer][how]["observed"] for run in groups.values())))
            cells.append(f"{np.mean([run[layer][how]['by_chance'] for run in groups.values()]):.1%}")
        return [layer, *cells]

    head = ["layer", "nearest point: separate", "by chance", "most attention: separate", "by chance"]
    return table(head, map(row, next(iter(groups.values()))))


def attention_table(results: Results) -> str:
    """Return where queries on the object and elsewhere attend."""

    def rows() -> Iterator[list[str]]:
        for name, runs in results["attention_maps"]["attention"].items():
            for layer in next(iter(runs.values())):
                cells = []
                for where in ("from_object", "from_elsewhere"):
                    values: dict[str, list[Any]] = {
                        key: [run[layer][where][key] for run in runs.values()]
                        for key in ("distance", "foreground", "uniform")
                    }
                    cells.append(f"{np.mean(values['distance']):.1f} px")
                    cells.append(
                        f"{format_share(seed_interval(values['foreground']))} ({np.mean(values['uniform']):.1%})"
                    )
                yield [f"`{name}`", layer, *cells]

    head = [
        "attention",
        "layer",
        "on it: distance",
        "foreground (uniform)",
        "elsewhere: distance",
        "foreground (uniform)",
    ]
    return table(head, rows(), left=2)


def background_attention(results: Results, layer: str, name: str) -> Array:
    """Return for each run the share of attention from beside the object that lies on it."""
    runs = results["attention_maps"]["attention"][name].values()
    return np.array([run[layer]["from_elsewhere"]["foreground"] for run in runs])


def attention_verdict(results: Results) -> str:
    """Return whether queries beside the object find it more than with shifted windows, and whether offsets do it."""
    sides = {}
    for layer in layers(results):
        ours, no_offsets, windows = (
            background_attention(results, layer, name) for name in (BASE, NO_OFFSETS, "shifted_window")
        )
        sizes = " against ".join(format_share(seed_interval(each)) for each in (ours, windows))
        baseline = f"{format_share(seed_interval(no_offsets))} without offsets"
        sides[f"{layer} ({sizes}, {baseline})"] = significant_sign(welch_difference(ours, windows))
    sentence = format_layers(sides, "more", "less")
    return f"**Attention of queries beside the object that lies on it, against shifted windows:** {sentence}."


def page(results: Results) -> str:
    """Return the page."""
    runs = results["attention_maps"]["points"][BASE]
    multi_object = results["attention_maps"]["multi_object_points"][BASE + MULTI_OBJECT]
    parts = (
        INTRODUCTION.format(
            scenes=results["attention_maps"]["scenes"], seeds=format_seeds(results["attention_maps"]["points"])
        ),
        CONTRACT,
        contract_verdict(results) + "\n",
        contract_table(runs),
        GROUPS,
        groups_table(runs),
        NETWORKS,
        networks_table(results),
        LEARNING,
        DEEPER,
        density_verdict(results) + "\n",
        OBJECTS,
        multi_object_verdict(results) + "\n",
        multi_object_table(results),
        "Where the points of these networks are, all objects of a scene together:\n",
        contract_table(multi_object),
        SWIN,
        attention_verdict(results) + "\n",
        attention_table(results),
    )
    return "\n".join(parts)
