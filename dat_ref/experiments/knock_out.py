"""Does the network that ships use its offsets? They are taken away, and others given, on scenes that it has not seen.

    python -m dat_ref.experiments.knock_out     # two minutes or so

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
from ..cli.scene import NAME, SIDE
from ..data import network_path
from ..layer import LayerTrace
from ..scenes import KINDS, Scenes
from ..torch import DAT, DeformableAttention, create_model
from ..torch.train.data import normalised
from . import keep
from .measures import COLUMNS, group_rows, interval
from .traces import traces

Change = Callable[[Tensor, Tensor], Tensor]  # raw offsets (B, G, 2, Hk, Wk), their mean (G, 2, 1, 1) → others
CHANGES: dict[str, Change] = {
    "none": lambda raw, mean: torch.zeros_like(raw),
    "one shift": lambda raw, mean: mean.expand_as(raw),
    "another scene's": lambda raw, mean: raw.roll(1, 0),
}
BATCH = 128
SCENES = 2048


def deformable(model: torch.nn.Module) -> dict[str, DeformableAttention]:
    """Return the deformable layers by where they are, stages and blocks counted from 1."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, DeformableAttention):
            stage, block = (int(part) + 1 for part in name.split(".") if part.isdigit())
            found[f"stage {stage}, block {block}"] = layer
    return found


@contextmanager
def changed(layer: DeformableAttention, change: Change, mean: Tensor) -> Iterator[None]:
    """Give a layer other raw offsets than its network's."""

    def instead(module: Any, given: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        raw = output[0].view(-1, layer.config.groups, *output[0].shape[1:])
        return change(raw, mean).flatten(0, 1), output[1]

    handle = layer.offset_network.register_forward_hook(instead)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


def mean_offsets(model: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return each group's mean raw offset, over scenes and places, for every deformable layer: (G, 2, 1, 1)."""
    seen: dict[str, list[Tensor]] = {name: [] for name in deformable(model)}
    with ExitStack() as stack:
        for name, layer in deformable(model).items():

            def keep(raw: Tensor, _: Tensor, to: list[Tensor] = seen[name]) -> Tensor:
                to.append(raw.mean((-2, -1), keepdim=True))
                return raw

            stack.enter_context(changed(layer, keep, torch.empty(0)))
        answers(model, images)
    return {name: torch.cat(parts).mean(0) for name, parts in seen.items()}


@torch.no_grad()
def answers(model: torch.nn.Module, images: Tensor) -> Array:
    """Return what the model says of each image, (n,)."""
    said: Array = torch.cat([model(part).argmax(1) for part in torch.split(images, BATCH)]).numpy()
    return said


def accuracies(model: torch.nn.Module, images: Tensor, labels: Array) -> dict[str, Any]:
    """Return how many images are named rightly with other offsets, in one layer or in all, and the differences."""
    layers, means = deformable(model), mean_offsets(model, images)
    trained = answers(model, images) == labels
    rows: dict[str, dict[str, Any]] = {}
    for where in (*layers, "all"):
        chosen = layers if where == "all" else {where: layers[where]}
        rows[where] = {}
        for what, change in CHANGES.items():
            with ExitStack() as stack:
                for name, layer in chosen.items():
                    stack.enter_context(changed(layer, change, means[name]))
                right = answers(model, images) == labels
            rows[where][what] = {
                "accuracy": float(right.mean()),
                "change": interval(right.astype(float) - trained),
            }
    return {"as_trained": interval(trained.astype(float)), "with_offsets": rows}


def by_group(model: DAT, images: Tensor, masks: Array) -> dict[str, Any]:
    """Return for each layer and group where its points are, moved and at rest, and how much attention objects get."""
    found: dict[str, list[list[tuple[float, ...]]]] = {}
    for image, mask in zip(images, masks):
        for layer, reduction, trace in traces(model, image[None]):
            if isinstance(trace, LayerTrace):
                found.setdefault(layer, []).append(group_rows(trace, mask, reduction))
    return {
        layer: [
            {name: interval(column) for name, column in zip(COLUMNS, group.T)}
            | {
                "points_minus_at_rest": interval(group[:, 0] - group[:, 1]),
                "distance_minus_at_rest": interval(group[:, 3] - group[:, 4]),
            }
            for group in np.array(rows).swapaxes(0, 1)
        ]
        for layer, rows in found.items()
    }


def measure(scenes: int = SCENES, looked_at: int = 512) -> dict[str, Any]:
    """Return all that is measured, on the first held-out scenes."""
    torch.set_num_threads(1)
    model = create_model(NAME, checkpoint=network_path(NAME), num_classes=len(KINDS)).eval()
    held_out = Scenes("which", "held_out", SIDE, length=scenes)
    made = list(held_out)
    images = torch.stack([normalised(scene.image) for scene in made])
    masks = np.array([scene.masks[0] for scene in made[:looked_at]])
    return {
        "command": "python -m dat_ref.experiments.knock_out",
        "model": NAME,
        "task": held_out.task,
        "scenes": scenes,
        "scenes_seed": held_out.seed,
        "looked_at": len(masks),
        "versions": {"dat_ref": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{platform.system()} {platform.machine()}, one thread",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "accuracy": accuracies(model, images, np.array([scene.label for scene in made])),
        "groups": by_group(model, images[:looked_at], masks),
    }


if __name__ == "__main__":
    keep("knock_out", measure())
