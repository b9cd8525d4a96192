"""Report on the offsets of a model: their size, their bound, their dependence on the image, and a verdict.

The offset d of a point is its distance from its position with zero offsets, in map pixels and after the bound. Its mean
square has three parts that add up to the whole. With the means over images n and positions i, for each group and axis,

    mean_n,i d²  =  (mean_n,i d)²  +  var_i (mean_n d)  +  mean_i (var_n d)
                    fixed shift       fixed pattern        dependent on the image

Only the last part can follow what is on the image. The others can be replaced by a fixed grid.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import ConfigError, integer
from ..ops.coverage import coverage
from ..ops.offsets import share_at_bound
from . import functional
from ._checks import check_tensor
from .bridge import as_numpy
from .layer import DeformableAttention
from .offset_ablation import ABLATIONS, ablated_offsets, deformable_layers, mean_offsets

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


# ------------------------------------------------------------------------------------------------ rules


@dataclass(frozen=True)
class Finding:
    """Finding on a layer or a network: its name, and an explanation with a remedy."""

    name: str
    text: str


@dataclass(frozen=True)
class Rule:
    """Rule of a verdict. `text` is a format string of the measured quantities."""

    name: str
    applies: Callable[[Any], bool]
    text: str


# All rules that apply are reported, in this order.
LAYER_RULES = (
    Rule(
        "not finite",
        lambda layer: not math.isfinite(layer.mean),
        "offsets are NaN or infinite; train again with a lower learning rate or clipped gradients",
    ),
    Rule(
        "cannot matter",
        lambda layer: layer.coverage >= FULL_COVERAGE,
        "the key grid of stride {stride} reads the whole map, so offsets cannot recover a missed pixel; use a stride "
        "of 3 or more, or a layer without offsets",
    ),
    Rule(
        "kernel below stride",
        lambda layer: layer.kernel_size < layer.stride,
        "the offset network has kernel {kernel_size} and does not see the whole cell that its point should search; use "
        "a kernel_size of at least the stride, {stride}",
    ),
    Rule(
        "does nothing",
        lambda layer: layer.mean < STILL,
        "the points move by {mean:.2g} pixels on average, which changes nothing; if the layer is trained, raise the "
        "learning rate or the bound (offset_range, s = {offset_range:g}), and check that the loss needs what lies "
        "between the points",
    ),
    Rule(
        "outside the map",
        lambda layer: layer.outside > OUTSIDE,
        "{outside:.0%} of the points are outside the map, where they read zeros and get no gradient; use a bound "
        '(offset_bound TANH_CELLS, s = 2), init="zero_offset" and a lower learning rate',
    ),
    Rule(
        "at the bound",
        lambda layer: layer.at_bound > AT_BOUND,
        "{at_bound:.0%} of the offset components are at their bound, where they hardly get a gradient; use "
        'init="zero_offset" and a lower learning rate, or a larger s',
    ),
    Rule(
        "one shift",
        lambda layer: layer.mean >= STILL and layer.image < IMAGE_DEPENDENT and layer.shift >= layer.pattern,
        "{shift:.0%} of the squared offsets are one shift of the whole grid, whatever the image shows; use "
        'init="zero_offset": a random initialization is such a shift; then a higher learning rate',
    ),
    Rule(
        "fixed pattern",
        lambda layer: layer.mean >= STILL and layer.image < IMAGE_DEPENDENT and layer.shift < layer.pattern,
        "{pattern:.0%} of the squared offsets are the same on every image at a position; use a kernel_size of at least "
        'the stride and init="zero_offset", and check that targets vary in position',
    ),
)
IN_USE = Rule(
    "healthy",
    lambda layer: True,
    "{image:.0%} of the squared offsets depend on the image; whether they help is measured with labels only",
)

# The first rule that applies is reported. `costs(kind)`: whether this ablation costs accuracy.
NETWORK_RULES = (
    Rule(
        "offsets unused",
        lambda report: not report.costs("zero"),
        "zero offsets cost no measurable accuracy: the network does not use its offsets; if it is well above chance "
        "and its layers are healthy, the task does not need them",
    ),
    Rule(
        "a shift is enough",
        lambda report: not report.costs("shift"),
        "the mean offset of each group costs no measurable accuracy: the network uses a fixed shift, not the image",
    ),
    Rule(
        "any image's are enough",
        lambda report: not report.costs("other"),
        "the offsets of another image cost no measurable accuracy: the network uses a fixed pattern, not the image",
    ),
    Rule("offsets used", lambda report: True, "the network needs the offsets of each image"),
)


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class LayerOffsets:
    """Offsets of a deformable layer, over all images, groups and positions.

    Args:
        name: name of the module in the model; empty for the model itself.
        stride, kernel_size, offset_bound, offset_range: fields of the layer's configuration.
        size: (H, W) of the map.
        key_size: (Hk, Wk) of the key grid.
        coverage: share of the map that the key grid reads with zero offsets. At 1, offsets cannot recover a pixel.
        mean, max: mean and maximum distance of the points from their positions with zero offsets, in map pixels.
        at_bound: share of the offset components at the bound, see `dat_ref.ops.offsets.share_at_bound`.
        outside: share of the points at least one pixel outside the map, where they read zeros.
        shift, pattern, image: parts of the mean square of the offsets: a fixed shift of each group, a fixed pattern
            over positions, and the part that depends on the image. Their sum is 1; all are 0 if all offsets are zero.
    """

    name: str
    stride: int
    kernel_size: int
    offset_bound: str
    offset_range: float
    size: tuple[int, int]
    key_size: tuple[int, int]
    coverage: float
    mean: float
    max: float
    at_bound: float
    outside: float
    shift: float
    pattern: float
    image: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings of `LAYER_RULES`; a single one named ``"healthy"`` if no rule applies."""
        rules = [rule for rule in LAYER_RULES if rule.applies(self)] or [IN_USE]
        return tuple(Finding(rule.name, rule.text.format(**asdict(self))) for rule in rules)


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
        rule = next(rule for rule in NETWORK_RULES if rule.applies(self))
        return Finding(rule.name, rule.text)

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
    row = (_title(layer), str(layer.stride), *sizes, f"{layer.coverage:.0%}", *lengths)
    return (*row, *(f"{share:.0%}" for share in shares))


def _accuracy(report: OffsetReport, kind: str, words: str) -> str:
    line = f"accuracy with {words}: {report.accuracies[kind]:.1%}"
    if kind == "own":
        return line
    return f"{line} (costs {report.accuracies['own'] - report.accuracies[kind]:.1%} ± {report.errors[kind]:.1%})"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------ measurement


@dataclass
class _Recorder:
    """Sums over the images of a layer's offsets."""

    name: str
    layer: DeformableAttention
    images: int = 0
    size: tuple[int, int] = (0, 0)
    total: Any = 0.0  # Σ d over images, (G, Hk, Wk, 2)
    squares: Any = 0.0  # Σ d² over images, (G, Hk, Wk, 2)
    distance: float = 0.0
    longest: float = 0.0
    at_bound: float = 0.0
    outside: float = 0.0

    def hook(self, module: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        """Add the offsets of a batch: a forward hook of the offset network."""
        config = self.layer.config
        height, width = inputs[0].shape[2:]
        if self.images and self.size != (height, width):
            raise ConfigError(
                f"model: expected one map size for layer {self.name!r}, got {self.size} and {(height, width)}"
            )
        self.size = (height, width)
        raw = output[0].detach().double()
        raw = raw.view(-1, config.groups, *raw.shape[1:]).permute(0, 1, 3, 4, 2)  # (B, G, Hk, Wk, 2)
        bounding: dict[str, Any] = {"offset_range": config.offset_range, "convention": config.convention}
        key_size = (raw.shape[2], raw.shape[3])
        reference = functional.reference_points(key_size, config.convention, dtype=raw.dtype, device=raw.device)
        offsets, points = functional.bound_offsets(raw, reference, config.offset_bound, **bounding)
        _, unmoved = functional.bound_offsets(torch.zeros_like(raw), reference, config.offset_bound, **bounding)
        points_px, unmoved_px = (functional.to_pixels(each, self.size, config.convention) for each in (points, unmoved))
        moved = points_px - unmoved_px
        self.total = self.total + moved.sum(0)
        self.squares = self.squares + moved.square().sum(0)
        self.images += len(raw)
        distance = moved.square().sum(-1).sqrt()
        self.distance += float(distance.mean((1, 2, 3)).sum())
        self.longest = float(torch.maximum(distance.max(), distance.new_tensor(self.longest)))  # keeps NaN
        arrays = as_numpy(offsets), as_numpy(reference)
        self.at_bound += len(raw) * share_at_bound(*arrays, config.offset_bound, **bounding)
        end = points_px.new_tensor(self.size)
        away = ((points_px <= -1) | (points_px >= end)).any(-1)
        self.outside += float(away.double().mean((1, 2, 3)).sum())

    def result(self) -> LayerOffsets:
        """Return the offsets over all images."""
        config, count = self.layer.config, self.images
        mean = self.total / count
        shift = mean.mean((1, 2))  # (G, 2)
        pattern = (mean - shift[:, None, None]).square()
        image = self.squares / count - mean.square()
        parts = [float(part.mean()) for part in (shift.square(), pattern, image.clamp(min=0))]
        whole = sum(parts)
        shares = [part / whole if whole else 0.0 for part in parts]
        return LayerOffsets(
            self.name,
            config.stride,
            config.kernel_size,
            config.offset_bound.name,
            config.offset_range,
            self.size,
            (self.total.shape[1], self.total.shape[2]),
            coverage(self.size, config.stride, config.convention),
            self.distance / count,
            self.longest,
            self.at_bound / count,
            self.outside / count,
            *shares,
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and restore its mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_deformable(model: nn.Module) -> dict[str, DeformableAttention]:
    """Return the layers of a model that have an offset network, by module name.

    Raises:
        ConfigError: if there is none.
    """
    layers = deformable_layers(model)
    if not layers:
        raise ConfigError(
            f"model: expected a DAT or another module with deformable layers that have offsets, got "
            f"{type(model).__name__} without one"
        )
    return layers


@torch.no_grad()
def offset_report(
    model: nn.Module, images: Tensor, labels: Tensor | None = None, *, batch_size: int = 64
) -> OffsetReport:
    """Measure the offsets of a model on images, and say whether they work.

    The model runs in eval mode; its mode is restored. With labels the accuracy is measured as well, with the model's
    own offsets and with the three ablations of `dat_ref.torch.offset_ablation`.

    Args:
        model: `DAT`, `DeformableAttention`, or a module that contains deformable layers.
        images: inputs of the model (N, C, H, W), N ≥ 2, in random order: "another image" is the previous one.
        labels: class indices (N,), or other targets of `dat_ref.torch.train.evaluate`: zeros and ones (N, classes),
            weights (N, classes, H, W) for a model that classifies every position.
        batch_size: images per forward pass.

    Raises:
        ConfigError, ShapeError: if the model has no deformable layer with offsets, there are fewer than two images, or
            the labels do not fit.

    >>> import dat_ref
    >>> config = dat_ref.DeformableAttentionConfig(8, 2, stride=4, kernel_size=5, bias="none")
    >>> layer = DeformableAttention(config, init="zero_offset")
    >>> report = offset_report(layer, torch.randn(4, 8, 16, 16))
    >>> [finding.name for finding in report.layers[0].findings]
    ['does nothing']
    """
    layers = check_deformable(model)
    check_tensor("images", images, {"N": None, "C": None, "H": None, "W": None})
    batch_size, count = integer(1)("batch_size", batch_size), len(images)
    if count < 2:
        raise ConfigError(f"images: expected at least 2, to compare their offsets, got {count}")
    if labels is not None and (labels.ndim not in (1, 2, 4) or len(labels) != count):
        raise ConfigError(
            f"labels: expected (N={count},), (N={count}, classes) or (N={count}, classes, H, W), "
            f"got {tuple(labels.shape)}"
        )
    parts = max(1, min(-(-count // batch_size), count // 2))  # a batch of one image would have no other image
    batches = images.tensor_split(parts)
    device = next(model.parameters()).device
    recorders = [_Recorder(name, layer) for name, layer in layers.items()]
    with _eval_mode(model):
        with ExitStack() as stack:
            for recorder in recorders:
                assert recorder.layer.offset_network is not None
                handle = recorder.layer.offset_network.register_forward_hook(recorder.hook)
                stack.callback(handle.remove)
            correct = _correct(model, batches, labels, device)
        _check_used(recorders)
        measured = tuple(recorder.result() for recorder in recorders)
        if correct is None:
            return OffsetReport(measured, count)
        accuracies, errors = {"own": float(correct.mean())}, {}
        means = mean_offsets(model, images.to(device), batch_size)
        for kind in ABLATIONS:
            with ablated_offsets(model, kind, means):
                ablated = _correct(model, batches, labels, device)
            assert ablated is not None
            accuracies[kind] = float(ablated.mean())
            errors[kind] = float((correct - ablated).std() / math.sqrt(count))
    return OffsetReport(measured, count, accuracies, errors)


def _correct(model: nn.Module, batches: Sequence[Tensor], labels: Tensor | None, device: torch.device) -> Tensor | None:
    """Run the model on all batches, and return the share of each image that is right, (N,) float64, if it has labels.

    Raises:
        ConfigError: if the labels do not fit the model's output.
    """
    from .train.evaluate import correct_predictions  # the training package is needed with labels only

    if labels is None:
        for batch in batches:
            model(batch.to(device))
        return None
    found, start = [], 0
    for batch in batches:
        logits, targets = model(batch.to(device)), labels[start : start + len(batch)].to(device)
        expected = tuple(logits.shape) if isinstance(logits, Tensor) else ()
        fits = targets.shape == expected or (targets.ndim == 1 and len(expected) == 2)
        if not fits or (targets.ndim == 1 and targets.is_floating_point()):
            raise ConfigError(
                f"labels: expected class indices or targets of the shape of the model's output, {expected} for a "
                f"batch, got {tuple(targets.shape)} {targets.dtype}"
            )
        found.append(correct_predictions(logits, targets).double())
        start += len(batch)
    return torch.cat(found)


def _check_used(recorders: Sequence[_Recorder]) -> None:
    unused = [recorder.name for recorder in recorders if not recorder.images]
    if unused:
        raise ConfigError(f"model: expected to run all its deformable layers, it did not run {', '.join(unused)}")
