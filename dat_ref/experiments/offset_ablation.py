"""Does the network that ships use its offsets? They are taken away, and others given, on scenes that it has not seen.

    python -m dat_ref.experiments.offset_ablation     # two minutes or so

The network was trained with offsets. That it needs them tells that it uses them; not that one trained without would be
worse.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from .._checks import Array
from ..data import NETWORK, network_card, network_path
from ..layer import LayerTrace
from ..scenes import KINDS, Scenes
from ..torch import DAT, DeformableAttention, create_model
from ..torch.train.data import normalised
from . import save_results
from .measures import COLUMNS, group_metrics, interval
from .recording import attention_traces

Ablation = Callable[[Tensor, Tensor], Tensor]  # raw offsets (B, G, 2, Hk, Wk), their mean (G, 2, 1, 1) → others
ABLATIONS: dict[str, Ablation] = {
    "none": lambda raw, mean: torch.zeros_like(raw),
    "one shift": lambda raw, mean: mean.expand_as(raw),
    "another scene's": lambda raw, mean: raw.roll(1, 0),
}
BATCH = 128
SCENES = 2048


def deformable_layers(model: torch.nn.Module) -> dict[str, DeformableAttention]:
    """Return the deformable layers by where they are, stages and blocks counted from 1."""
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, DeformableAttention):
            stage, block = (int(part) + 1 for part in name.split(".") if part.isdigit())
            layers[f"stage {stage}, block {block}"] = layer
    return layers


@contextmanager
def ablated(layer: DeformableAttention, ablation: Ablation, mean: Tensor) -> Iterator[None]:
    """Give a layer other raw offsets than its network's."""

    def hook(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        raw = output[0].view(-1, layer.config.groups, *output[0].shape[1:])
        return ablation(raw, mean).flatten(0, 1), output[1]

    handle = layer.offset_network.register_forward_hook(hook)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


def mean_offsets(model: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return each group's mean raw offset, over scenes and places, for every deformable layer: (G, 2, 1, 1)."""
    means: dict[str, list[Tensor]] = {name: [] for name in deformable_layers(model)}
    with ExitStack() as stack:
        for name, layer in deformable_layers(model).items():

            def record(raw: Tensor, _: Tensor, destination: list[Tensor] = means[name]) -> Tensor:
                destination.append(raw.mean((-2, -1), keepdim=True))
                return raw

            stack.enter_context(ablated(layer, record, torch.empty(0)))
        predict(model, images)
    return {name: torch.cat(parts).mean(0) for name, parts in means.items()}


@torch.no_grad()
def predict(model: torch.nn.Module, images: Tensor) -> Array:
    """Return what the model says of each image, (n,)."""
    predictions: Array = torch.cat([model(part).argmax(1) for part in torch.split(images, BATCH)]).numpy()
    return predictions


def ablation_accuracies(model: torch.nn.Module, images: Tensor, labels: Array) -> dict[str, Any]:
    """Return how many images are named rightly with other offsets, in one layer or in all, and the differences."""
    layers, means = deformable_layers(model), mean_offsets(model, images)
    trained = predict(model, images) == labels
    rows: dict[str, dict[str, Any]] = {}
    for target in (*layers, "all"):
        selected = layers if target == "all" else {target: layers[target]}
        rows[target] = {}
        for kind, ablation in ABLATIONS.items():
            with ExitStack() as stack:
                for name, layer in selected.items():
                    stack.enter_context(ablated(layer, ablation, means[name]))
                correct = predict(model, images) == labels
            rows[target][kind] = {
                "accuracy": float(correct.mean()),
                "change": interval(correct.astype(float) - trained),
            }
    return {"as_trained": interval(trained.astype(float)), "with_offsets": rows}


def group_intervals(model: DAT, images: Tensor, masks: Array) -> dict[str, Any]:
    """Return for each layer and group where its points are, moved and at rest, and how much attention objects get."""
    results: dict[str, list[list[tuple[float, ...]]]] = {}
    for image, mask in zip(images, masks):
        for layer, reduction, trace in attention_traces(model, image[None]):
            if isinstance(trace, LayerTrace):
                results.setdefault(layer, []).append(group_metrics(trace, mask, reduction))
    return {
        layer: [
            {name: interval(column) for name, column in zip(COLUMNS, group.T)}
            | {
                "points_minus_reference": interval(group[:, 0] - group[:, 1]),
                "distance_minus_reference": interval(group[:, 3] - group[:, 4]),
            }
            for group in np.array(rows).swapaxes(0, 1)
        ]
        for layer, rows in results.items()
    }


def measure(scenes: int = SCENES, traced_scenes: int = 512) -> dict[str, Any]:
    """Return all that is measured, on the first held-out scenes."""
    torch.set_num_threads(1)
    model = create_model(NETWORK, checkpoint=network_path(NETWORK), num_classes=len(KINDS)).eval()
    held_out = Scenes("which", "held_out", network_card()["recipe"]["image_size"], length=scenes)
    drawn = list(held_out)
    images = torch.stack([normalised(scene.image) for scene in drawn])
    masks = np.array([scene.masks[0] for scene in drawn[:traced_scenes]])
    return {
        "command": "python -m dat_ref.experiments.offset_ablation",
        "model": NETWORK,
        "task": held_out.task,
        "scenes": scenes,
        "scenes_seed": held_out.seed,
        "traced_scenes": len(masks),
        "versions": {"dat_ref": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{platform.system()} {platform.machine()}, one thread",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "accuracy": ablation_accuracies(model, images, np.array([scene.label for scene in drawn])),
        "groups": group_intervals(model, images[:traced_scenes], masks),
    }


if __name__ == "__main__":
    save_results("offset_ablation", measure())
