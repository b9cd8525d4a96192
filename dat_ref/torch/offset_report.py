"""Report on the offsets of a model: their size, their bound, their dependence on the image, and a verdict.

The offset d of a point is its distance from its position with zero offsets, in map pixels and after the bound. Its mean
square has three parts that add up to the whole. With the means over images n and positions i, for each group and axis,

    mean_n,i d²  =  (mean_n,i d)²  +  var_i (mean_n d)  +  mean_i (var_n d)
                    fixed shift       fixed pattern        dependent on the image

Only the last part can follow what is on the image. The others can be replaced by a fixed grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import ConfigError, integer
from ._checks import check_tensor
from .offset_ablation import ABLATIONS, ablated_offsets, mean_offsets
from .offset_adapters import OffsetLayer, offset_layers
from .offset_findings import LayerOffsets, OffsetReport


@dataclass
class Measurement:
    """Sums over the images of a layer's offsets."""

    layer: OffsetLayer
    images: int = 0
    sizes: Any = None  # of the maps, see `Points`
    total: Any = 0.0  # Σ d over images, (G, Hk, Wk, 2)
    squares: Any = 0.0  # Σ d² over images, (G, Hk, Wk, 2)
    distance: float = 0.0
    longest: float = 0.0
    at_bound: float = 0.0
    outside: float = 0.0

    def add(self, raw: Tensor, call: Any) -> None:
        """Add the offsets of a batch, see `OffsetLayer.points`."""
        found = self.layer.points(raw.detach(), call)
        moved, count, sizes = found.moved, len(raw), found.sizes[:, 0, 0].tolist()
        if self.images and (sizes, moved.shape[1:]) != (self.sizes, self.total.shape):
            raise ConfigError(
                f"model: expected one map size for layer {self.layer.name!r}, got {self.sizes} and {sizes}"
            )
        self.sizes = sizes
        self.total = self.total + moved.sum(0)
        self.squares = self.squares + moved.square().sum(0)
        self.images += count
        distance = moved.square().sum(-1).sqrt()
        self.distance += float(distance.mean((1, 2, 3)).sum())
        self.longest = float(torch.maximum(distance.max(), distance.new_tensor(self.longest)))  # keeps NaN
        self.at_bound += count * found.at_bound
        self.outside += float(found.outside.double().mean((1, 2, 3)).sum())

    def result(self) -> LayerOffsets:
        """Return the offsets over all images."""
        count = self.images
        mean = self.total / count
        shift = mean.mean((1, 2))  # (G, 2)
        pattern = (mean - shift[:, None, None]).square()
        image = self.squares / count - mean.square()
        parts = [float(part.mean()) for part in (shift.square(), pattern, image.clamp(min=0))]
        whole = sum(parts)
        shift_share, pattern_share, image_share = (part / whole if whole else 0.0 for part in parts)
        height, width = self.sizes[0]
        size = (int(height), int(width))
        return LayerOffsets(
            self.layer.name,
            self.layer.kind,
            size,
            (self.total.shape[1], self.total.shape[2]),
            self.distance / count,
            self.longest,
            self.at_bound / count,
            self.outside / count,
            shift_share,
            pattern_share,
            image_share,
            **self.layer.settings(size),
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


def check_deformable(model: nn.Module) -> dict[str, OffsetLayer]:
    """Return the layers of a model that predict or get offsets, by module name.

    Raises:
        ConfigError: if there is none.
    """
    layers = offset_layers(model)
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
        model: `DAT`, `DeformableAttention`, or a module that contains deformable layers: ours,
            torchvision's `DeformConv2d`, or multi-scale deformable attention of Deformable DETR or transformers.
        images: inputs of the model (N, C, H, W), N ≥ 2, in random order: "another image" is the previous one.
        labels: class indices (N,), or other targets of `dat_ref.torch.train.evaluate`: zeros and ones (N, classes),
            weights (N, classes, H, W) for a model that classifies every position.
        batch_size: images per forward pass.

    Raises:
        ConfigError, ShapeError: if the model has no deformable layer with offsets, there are fewer than two images, or
            the labels do not fit.

    >>> import dat_ref
    >>> config = dat_ref.DeformableAttentionConfig(8, 2, stride=4, kernel_size=5, bias="none")
    >>> layer = dat_ref.torch.DeformableAttention(config, init="zero_offset")
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
    measurements = [Measurement(layer) for layer in layers.values()]
    with _eval_mode(model):
        with ExitStack() as stack:
            for measurement in measurements:
                stack.enter_context(measurement.layer.intercepted(measurement.add))
            correct = _correct(model, batches, labels, device)
        _check_used(measurements)
        measured = tuple(measurement.result() for measurement in measurements)
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


def _check_used(measurements: Sequence[Measurement]) -> None:
    unused = [measurement.layer.name for measurement in measurements if not measurement.images]
    if unused:
        raise ConfigError(f"model: expected to run all its deformable layers, it did not run {', '.join(unused)}")
