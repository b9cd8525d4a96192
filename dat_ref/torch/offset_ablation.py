"""Ablation of offsets at test time: the same weights with zero offsets, one fixed shift, or another image's offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .offset_adapters import OffsetLayer, offset_layers

# (raw offsets (B, G, 2, Hk, Wk), their mean over images and positions (G, 2, 1, 1)) → raw offsets
Ablation = Callable[[Tensor, Tensor], Tensor]
ABLATIONS: dict[str, Ablation] = {
    "zero": lambda raw, mean: torch.zeros_like(raw),
    "shift": lambda raw, mean: mean.expand_as(raw),
    "other": lambda raw, mean: raw.roll(1, 0),
}


@contextmanager
def replaced_offsets(layer: OffsetLayer, ablation: Ablation, mean: Tensor) -> Iterator[None]:
    """Replace a layer's raw offsets inside the context.

    Args:
        layer: one of `offset_layers`.
        ablation: function that returns the replacement.
        mean: mean raw offset of each group, (G, 2, 1, 1).
    """
    with layer.intercepted(lambda raw, _: ablation(raw, mean)):
        yield


@torch.no_grad()
def mean_offsets(model: nn.Module, images: Tensor, batch_size: int = 128) -> dict[str, Tensor]:
    """Return the mean raw offset of each group, over images and positions, by name of the layer.

    Args:
        model: takes images (B, channels, H, W).
        images: (N, channels, H, W), N ≥ 1.
        batch_size: images per forward pass.

    Returns:
        module name → (G, 2, 1, 1).
    """
    layers = offset_layers(model)
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(raw: Tensor, _: Tensor, destination: list[Tensor] = sums[name]) -> Tensor:
                destination.append(raw.mean((-2, -1), keepdim=True))
                return raw

            stack.enter_context(replaced_offsets(layer, record, torch.empty(0)))
        for part in images.split(batch_size):
            model(part)
    return {name: torch.cat(parts).mean(0) for name, parts in sums.items()}


@contextmanager
def ablated_offsets(model: nn.Module, kind: str, means: dict[str, Tensor]) -> Iterator[None]:
    """Ablate the offsets of all deformable layers of a model inside the context.

    Args:
        model: with at least one of `offset_layers`.
        kind: ``"zero"`` (points stay at the reference points), ``"shift"`` (one offset for each group, from `means`),
            or ``"other"`` (offsets of the previous image in the batch).
        means: result of `mean_offsets`.
    """
    with ExitStack() as stack:
        for name, layer in offset_layers(model).items():
            stack.enter_context(replaced_offsets(layer, ABLATIONS[kind], means[name]))
        yield
