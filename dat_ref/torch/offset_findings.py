"""Findings on offsets: thresholds, rules, and the report that applies them.

`dat_ref.torch.offset_report` measures; this module says what the measures mean, and how to change them.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# ------------------------------------------------------------------------------------------------ thresholds

# A bilinear weight changes by at most the distance that its point moves, on each axis. With less than a twentieth of a
# pixel, a key stays within a few percent of the key without offsets.
STILL = 0.05  # pixels
# A point at least one pixel outside the map reads zeros and gets no gradient. Near the border some points leave the map
# while they search their own cell; more than a quarter of all points is not the border alone.
OUTSIDE = 0.25
# At 99 % of the limit of a tanh its gradient is 2 % of the gradient at zero, and a clamp has none: if most of the
# components are there, the offsets hardly learn.
AT_BOUND = 0.5
# Offsets are a root of the parts above: below a tenth, the part that follows the image is at most a third (√0.1) of the
# typical offset.
IMAGE_DEPENDENT = 0.1
# Coverage of a grid that misses no pixel (strides 1 and 2 with cell centers), see `dat_ref.ops.coverage`.
FULL_COVERAGE = 1.0
# Standard errors of a difference of accuracies between two runs on the same images: about 95 % confidence.
NOTICEABLE = 2.0


OWN = "deformable attention"  # kind of our layers, whose configuration the remedies can name


# ------------------------------------------------------------------------------------------------ rules


@dataclass(frozen=True)
class Finding:
    """Finding on a layer or a network: its name, and an explanation with a remedy."""

    name: str
    text: str


@dataclass(frozen=True)
class Rule:
    """Rule of a verdict: the fact and the remedy, format strings of the measured quantities.

    `others` is the remedy for deformable convolution and multi-scale deformable attention, if it differs.
    """

    name: str
    applies: Callable[[Any], bool]
    fact: str
    remedy: str
    others: str = ""

    def finding(self, measured: Mapping[str, Any]) -> Finding:
        """Return the finding on measured quantities."""
        own = measured.get("kind", OWN) == OWN or not self.others
        return Finding(self.name, f"{self.fact}; {self.remedy if own else self.others}".format(**measured))


# All rules that apply are reported, in this order.
LAYER_RULES = (
    Rule(
        "not finite",
        lambda layer: not math.isfinite(layer.mean),
        "offsets are NaN or infinite",
        "train again with a lower learning rate or clipped gradients",
    ),
    Rule(
        "cannot matter",
        lambda layer: layer.coverage is not None and layer.coverage >= FULL_COVERAGE,
        "the key grid of stride {stride} reads the whole map, so offsets cannot recover a missed pixel",
        "use a stride of 3 or more, or a layer without offsets",
    ),
    Rule(
        "kernel below stride",
        lambda layer: layer.kernel_size is not None and layer.kernel_size < layer.stride,
        "the offset network has kernel {kernel_size} and does not see the whole cell that its point should search",
        "use a kernel_size of at least the stride, {stride}",
    ),
    Rule(
        "does nothing",
        lambda layer: layer.mean < STILL,
        "the points move by {mean:.2g} pixels on average, which changes nothing",
        "if the layer is trained, raise the learning rate or the bound (offset_range, s = {offset_range:g}), and check "
        "that the loss needs what lies between the points",
        "if the layer is trained, raise the learning rate of the layer that predicts the offsets, and check that the "
        "loss needs other pixels",
    ),
    Rule(
        "outside the map",
        lambda layer: layer.outside > OUTSIDE,
        "{outside:.0%} of the points left the map, where they read zeros and get no gradient",
        'use a bound (offset_bound TANH_CELLS, s = 2), init="zero_offset" and a lower learning rate',
        "bound the offsets, for example c · tanh(offset / c) with c pixels, and lower the learning rate of the layer "
        "that predicts them",
    ),
    Rule(
        "at the bound",
        lambda layer: layer.at_bound > AT_BOUND,
        "{at_bound:.0%} of the offset components are at their bound, where they hardly get a gradient",
        'use init="zero_offset" and a lower learning rate, or a larger s',
    ),
    Rule(
        "one shift",
        lambda layer: layer.mean >= STILL and layer.image < IMAGE_DEPENDENT and layer.shift >= layer.pattern,
        "{shift:.0%} of the squared offsets are one shift of the whole grid, whatever the image shows",
        'use init="zero_offset": a random initialization is such a shift; then a higher learning rate',
        "if the layer is trained, raise the learning rate of the layer that predicts the offsets; fixed points do the "
        "same at a lower cost",
    ),
    Rule(
        "fixed pattern",
        lambda layer: layer.mean >= STILL and layer.image < IMAGE_DEPENDENT and layer.shift < layer.pattern,
        "{pattern:.0%} of the squared offsets are the same on every image at a position",
        'use a kernel_size of at least the stride and init="zero_offset", and check that targets vary in position',
        "raise the learning rate of the layer that predicts the offsets, and check that targets vary in position",
    ),
)
IN_USE = Rule(
    "healthy",
    lambda layer: True,
    "{image:.0%} of the squared offsets depend on the image",
    "whether they help is measured with labels only",
)

# The first rule that applies is reported. `costs(kind)`: whether this ablation costs accuracy.
NETWORK_RULES = (
    Rule(
        "offsets unused",
        lambda report: not report.costs("zero"),
        "zero offsets cost no measurable accuracy: the network does not use its offsets",
        "if it is well above chance and its layers are healthy, the task does not need them",
    ),
    Rule(
        "a shift is enough",
        lambda report: not report.costs("shift"),
        "the mean offset of each group costs no measurable accuracy",
        "the network uses a fixed shift, not the image",
    ),
    Rule(
        "any image's are enough",
        lambda report: not report.costs("other"),
        "the offsets of another image cost no measurable accuracy",
        "the network uses a fixed pattern, not the image",
    ),
    Rule(
        "offsets used",
        lambda report: True,
        "zero offsets, a shift and the offsets of another image cost accuracy",
        "the network needs the offsets of each image",
    ),
)


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class LayerOffsets:
    """Offsets of a deformable layer, over all images, groups and positions.

    Args:
        name: name of the module in the model; empty for the model itself.
        kind: ``"deformable attention"``, ``"deformable convolution"``, ``"multi-scale deformable attention"``, or the
            kind of a peer. In a convolution each tap counts as a group, in the others each point of a head and level.
        size: (H, W) of the map, of the first level if there are several.
        key_size: (Hk, Wk), positions of a group: key cells, output pixels, or (queries, 1).
        stride, kernel_size, offset_bound, offset_range, coverage: fields of the configuration of deformable attention,
            and the share of the map that the key grid reads with zero offsets. At 1, offsets cannot recover a pixel.
            None for the other kinds, in which each query has its own points.
        mean, max: mean and maximum distance of the points from their positions with zero offsets, in map pixels.
        at_bound: share of the offset components at the bound, see `dat_ref.ops.offsets.share_at_bound`.
        outside: share of the points that their offsets moved at least one pixel outside the map, where they read zeros.
        shift, pattern, image: parts of the mean square of the offsets: a fixed shift of each group, a fixed pattern
            over positions, and the part that depends on the image. Their sum is 1; all are 0 if all offsets are zero.
    """

    name: str
    kind: str
    size: tuple[int, int]
    key_size: tuple[int, int]
    mean: float
    max: float
    at_bound: float
    outside: float
    shift: float
    pattern: float
    image: float
    stride: int | None = None
    kernel_size: int | None = None
    offset_bound: str | None = None
    offset_range: float | None = None
    coverage: float | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings of `LAYER_RULES`; a single one named ``"healthy"`` if no rule applies."""
        rules = [rule for rule in LAYER_RULES if rule.applies(self)] or [IN_USE]
        return tuple(rule.finding(asdict(self)) for rule in rules)


@dataclass(frozen=True)
class OffsetReport:
    """Report of `offset_report`. ``str(report)`` is a table with the verdicts.

    Args:
        layers: one entry for each layer with an offset network.
        images: number of images.
        accuracies: accuracy with the model's own offsets (``"own"``), with zero offsets (``"zero"``), with the mean
            offset of each group (``"shift"``), and with another image's offsets (``"other"``); empty without labels.
        errors: standard error of the accuracy that each ablation costs, from the differences on each image.
    """

    layers: tuple[LayerOffsets, ...]
    images: int
    accuracies: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def costs(self, kind: str) -> bool:
        """Return whether an ablation lowers the accuracy by more than `NOTICEABLE` standard errors."""
        return self.accuracies["own"] - self.accuracies[kind] > NOTICEABLE * self.errors[kind]

    @property
    def finding(self) -> Finding | None:
        """Finding of `NETWORK_RULES` on the accuracies, or None without labels."""
        if not self.accuracies:
            return None
        return next(rule for rule in NETWORK_RULES if rule.applies(self)).finding({})

    def to_dict(self) -> dict[str, Any]:
        """Return the report with its findings as a JSON object; numbers that are not finite become None."""
        layers = [
            {name: _finite(value) for name, value in asdict(layer).items()}
            | {"findings": [asdict(finding) for finding in layer.findings]}
            for layer in self.layers
        ]
        finding = None if self.finding is None else asdict(self.finding)
        return {**asdict(self), "layers": layers, "finding": finding}

    def __str__(self) -> str:
        rows = [_HEADER, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        lines = [f"offsets on {self.images} images, in pixels of each layer's map", ""]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
            lines.append("  ".join(cells))
        lines.append("")
        layers_of: dict[str, list[str]] = {}  # by finding, because many layers can have the same
        for layer in self.layers:
            for finding in layer.findings:
                layers_of.setdefault(f"{finding.name}: {finding.text}", []).append(_title(layer))
        lines += [_wrap(f"{', '.join(names)}: {text}") for text, names in layers_of.items()]
        if self.finding is not None:
            lines.append("")
            lines += [_accuracy(self, kind, words) for kind, words in _WORDS.items()]
            lines.append(_wrap(f"network: {self.finding.name}: {self.finding.text}"))
        lines += ["", CAVEAT]
        return "\n".join(lines)


_HEADER = (
    *("layer", "stride", "map", "keys", "coverage", "mean", "max", "at bound", "outside"),
    *("shift", "pattern", "image"),
)
_WORDS = {
    "own": "its own offsets",
    "zero": "zero offsets",
    "shift": "the mean offset of each group",
    "other": "another image's offsets",
}
CAVEAT = (
    "coverage: share of the map that is read with zero offsets. Convolutions and windows before a layer carry what\n"
    "lies between the points to them, so that offsets can matter less than coverage says."
)


def _wrap(text: str) -> str:
    return textwrap.fill(text, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _title(layer: LayerOffsets) -> str:
    return layer.name or "layer"


def _row(layer: LayerOffsets) -> tuple[str, ...]:
    sizes = (f"{height}×{width}" for height, width in (layer.size, layer.key_size))
    shares = (layer.at_bound, layer.outside, layer.shift, layer.pattern, layer.image)
    lengths = (f"{length:.2f}" for length in (layer.mean, layer.max))
    stride, read = (
        "-" if value is None else text.format(value)
        for value, text in ((layer.stride, "{}"), (layer.coverage, "{:.0%}"))
    )
    row = (_title(layer), stride, *sizes, read, *lengths)
    return (*row, *(f"{share:.0%}" for share in shares))


def _accuracy(report: OffsetReport, kind: str, words: str) -> str:
    line = f"accuracy with {words}: {report.accuracies[kind]:.1%}"
    if kind == "own":
        return line
    return f"{line} (costs {report.accuracies['own'] - report.accuracies[kind]:.1%} ± {report.errors[kind]:.1%})"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
