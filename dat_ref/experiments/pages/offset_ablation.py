"""The page "Does it use its offsets?"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .formatting import format_difference, format_share, significant_sign, table

INTRODUCTION = """\
# Does the trained network use its offsets?

[`dat_nano`]({training}), the small network that ships, was trained once, with one seed, to name the one
object on a scene. Here its offsets are taken away or exchanged, with its weights as they are, and its points are
compared with the object's mask. The numbers are those of `{file}`, measured on {machine}, with
torch {torch}, on {date}:

    {command}
"""

BASELINE = """\
## Its baseline without offsets

That a network needs what it learned with tells nothing of how good one is that learned without. So `{model}` has a
baseline: its points stay at rest, and all else is the same: recipe, first weights, scenes and their order. Trained from
nothing, on {held_out} held-out scenes:

{table}
{verdict} {only}

Intervals are over scenes, for one network of each kind. What another seed would change is not in them;
[the small network](ablations.md#offsets) was trained both ways with several seeds.

    {command}
"""

CHANGES = """\
## Other offsets, the same weights

Offsets are replaced in one layer or in all: by none, by one shift (the mean of each group over places and scenes,
before the bound), or by those that the layer predicts for another scene. As trained it names {trained} of {scenes}
held-out scenes rightly. What changes, in points of accuracy, with the 95 % interval of the difference scene by scene:
"""

GROUPS = """\
## Where the points of each group are

On {traced_scenes} of these scenes: the share of a group's points on the object, the share of its reference points, how
much farther from the object the points are than the reference points (mean distance to its nearest pixel, in pixels
of the image; less than 0 is nearer), and the share of the group's attention, all queries together, that points on
the object get. Points outside of the image count as well.
"""

LIMITS = """\
## What was not measured

Other seeds: intervals here are over scenes, for one set of weights, and another run may differ by more. Another range:
the points of this network may go two key cells, s = 4 ([what that does to the small network](ablations.md#offsets)).
"""


def baseline_verdict(results: Mapping[str, Any]) -> str:
    """Return the verdict on whether the network is better than its baseline trained without offsets."""
    change = results["difference"]
    sentence = {
        1: f"`{results['model']}` is more accurate than its baseline without offsets",
        0: f"That `{results['model']}` is more accurate than its baseline without offsets was not shown",
        -1: f"`{results['model']}` is less accurate than its baseline without offsets",
    }[significant_sign(change)]
    size = format_difference(change, 100)
    return f"**{sentence}:** a difference of {size} points, scene by scene, one network of each kind."


def baseline_table(results: Mapping[str, Any]) -> str:
    """Return both networks."""
    names = ((f"`{results['model']}`", "model", "accuracy"), ("its baseline without offsets", "baseline", "baseline"))
    rows = ([name, f"{results['parameters'][which]:,}", format_share(results[key])] for name, which, key in names)
    return table(["network", "parameters", "accuracy"], rows)


def ablation_verdict(results: Mapping[str, Any]) -> str:
    """Return the verdict on whether offsets are used, and whether it matters that they follow the scene."""
    rows = results["accuracy"]["with_offsets"]["all"]
    without, shift, other = (rows[what]["change"] for what in ("none", "one shift", "another scene's"))
    if significant_sign(without) >= 0:
        return {
            0: "**That the network uses its offsets was not shown**: without any it is about as often right.",
            1: "**The offsets harm the network**: without any it is more often right.",
        }[significant_sign(without)]
    back = 1 - shift["mean"] / without["mean"]
    used = "**The network depends on its offsets**: without any it is less often right. "
    used += f"One shift for each group, the same for all scenes and places, brings back {back:.0%} of what is lost. "
    follows = {
        -1: "That offsets follow the scene matters: with another scene's it loses",
        0: "That offsets follow the scene was not shown to matter: with another scene's it changes by",
        1: "Offsets that follow the scene harm it: with another scene's it gains",
    }[significant_sign(other)]
    size = format_difference(other, 100) if significant_sign(other) == 0 else format_difference(other, 100)[1:]
    return f"{used}{follows} {size} points of accuracy."


def gathering_verdict(results: Mapping[str, Any]) -> str:
    """Return the verdict on whether points went to the objects."""
    sides = [
        significant_sign(group["points_minus_reference"]) for groups in results["groups"].values() for group in groups
    ]
    counts = {side: sides.count(side) for side in (1, -1, 0)}
    sentence = (
        f"Of {len(sides)} groups {counts[1]} have more of their points on the object than at rest, {counts[-1]} fewer, "
        f"and for {counts[0]} the interval holds 0."
    )
    if counts[1] == len(sides):
        return f"**The points gather on the object in every group.** {sentence}"
    return f"**That points gather on objects, as the article shows, is not reproduced by this network.** {sentence}"


def changes_table(results: Mapping[str, Any]) -> str:
    """Return what other offsets change."""
    rows = results["accuracy"]["with_offsets"]
    columns = list(rows["all"])
    cells = ([where, *(format_difference(row[what]["change"], 100) for what in columns)] for where, row in rows.items())
    return table(["layer", *columns], cells)


def groups_table(results: Mapping[str, Any]) -> str:
    """Return where the points of each group are."""

    def row(layer: str, number: int, group: Mapping[str, Any]) -> list[str]:
        shares = [format_share(group[name]) for name in ("points", "reference")]
        return [
            layer,
            str(number),
            *shares,
            format_difference(group["distance_minus_reference"]),
            format_share(group["attention"]),
        ]

    rows = (row(layer, *each) for layer, groups in results["groups"].items() for each in enumerate(groups, 1))
    return table(["layer", "group", "points", "at rest", "farther by", "attention"], rows)


def page(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        results, baseline: what the experiments of these names found.
    """
    introduction = INTRODUCTION.format(
        training="../training.md#the-network-that-ships",
        file="dat_ref/experiments/measured/offset_ablation.json",
        torch=results["versions"]["torch"],
        **{name: results[name] for name in ("machine", "date", "command")},
    )
    trained = format_share(results["accuracy"]["as_trained"])
    changes = CHANGES.format(trained=trained, scenes=results["scenes"])
    groups = GROUPS.format(traced_scenes=results["traced_scenes"])
    verdicts = (ablation_verdict(results) + "\n", gathering_verdict(results) + "\n")
    other = BASELINE.format(
        table=baseline_table(baseline),
        verdict=baseline_verdict(baseline),
        only=f"{baseline['only_model_right']} scenes it alone names rightly, "
        f"{baseline['only_baseline_right']} its baseline alone.",
        **{name: baseline[name] for name in ("model", "held_out", "command")},
    )
    parts = (introduction, *verdicts, changes, changes_table(results), other, groups, groups_table(results), LIMITS)
    return "\n".join(parts)
