"""Figures of what was found.

python -m dat_ref.experiments.figures docs/images/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..viz.style import GROUP_COLORS, HAIRLINE, INK, QUIET, save, with_style
from . import load_results
from .models import BASE
from .pages import peers
from .pages.formatting import accuracy
from .pages.points import layer_values

BLUE, VERMILION, GREEN = GROUP_COLORS[:3]
SHARES = {"attention": (VERMILION, "attention that the points on it get"), "points": (BLUE, "points on the object")}


@with_style
def draw_accuracies(study: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """Draw how accurate networks are: a dot for each seed, a bar for the interval of the mean.

    Args:
        study: what `study` found.
        names: of the networks, from the top down.
    """
    figure = Figure(figsize=(7.6, 0.9 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        estimate = accuracy(study, name)
        color = BLUE if name == BASE else INK
        ends = np.clip([estimate["mean"] - estimate["half_width"], estimate["mean"] + estimate["half_width"]], 0, 1)
        axes.plot(ends, [row, row], color=color, lw=5, alpha=0.16, solid_capstyle="butt")
        axes.plot(estimate["mean"], row, "|", color=color, ms=11, mew=1.8)
        seeds = [run["accuracy"] for run in study["runs"][name].values()]
        axes.plot(seeds, [row] * len(seeds), "o", color=color, ms=3.4, mec="white", mew=0.4)
    axes.axvline(accuracy(study, BASE)["mean"], color=BLUE, lw=0.8, dashes=(4, 3))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x", color=HAIRLINE, lw=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("held-out scenes named rightly; dots are seeds, the bar is the 95 % interval of their mean")
    return figure


@with_style
def draw_training(training: Mapping[str, Any]) -> Figure:
    """Draw the share of points, and of attention, on the object while a network learns: a line for each seed.

    Args:
        training: of `attention_maps`, one network's: seed → step → layer → groups.
    """
    steps = {seed: [int(step) for step in results] for seed, results in training.items()}
    layers = list(next(iter(next(iter(training.values())).values())))
    figure = Figure(figsize=(9.4, 2.9), layout="constrained")
    panels = figure.subplots(1, len(layers), sharey=True, sharex=True)
    for axes, layer in zip(panels, layers):
        for measure, (color, label) in SHARES.items():
            for number, (seed, results) in enumerate(training.items()):
                values = layer_values(results, layer, measure)
                axes.plot(steps[seed], values, color=color, lw=1.3, alpha=0.85, label=None if number else label)
        reference = np.mean([layer_values(results, layer, "reference") for results in training.values()])
        axes.axhline(reference, color=QUIET, lw=0.9, dashes=(3, 2), label="points at rest")
        axes.set_title(layer)
        axes.set_xlabel("training steps")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=HAIRLINE, lw=0.4, alpha=0.6)
        axes.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=2)
    return figure


def main(folder: Path) -> None:
    """Draw all figures of the site."""
    folder.mkdir(parents=True, exist_ok=True)
    study = load_results("study")
    save(draw_accuracies(study, peers.names(study)), folder / "peers.svg")
    others = [name for name, each in study["variants"].items() if each["part"] != "peers"]
    save(draw_accuracies(study, others), folder / "ablations.svg")
    save(draw_training(load_results("attention_maps")["training"][BASE]), folder / "learning.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
