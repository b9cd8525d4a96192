"""Is the network that ships better than its twin, trained from nothing with the same recipe but without offsets?

    python -m dat_ref.experiments.twin runs/twin     # an hour on one thread; a stopped one goes on

The twin's points stay at rest; all else is the same: recipe, first weights, scenes and their order, and which epoch's
weights count (the most accurate one's). One network of each kind: what another seed changes is not measured here.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from .._checks import Array
from ..cli.scene import NAME, card
from ..cli.train import data_sets
from ..config import DATConfig, DeformableAttentionConfig, OffsetBound
from ..data import network_path
from ..presets import config as preset
from ..torch import DAT, create_model
from ..torch.checkpoints import load_checkpoint
from ..torch.train import SceneImages, fit
from ..torch.train.loop import build_model
from ..train_config import TrainConfig
from . import keep
from .knock_out import answers
from .measures import interval


def without_offsets(config: DATConfig) -> DATConfig:
    """Return a network whose deformable layers leave their points at rest."""

    def still(block: Any) -> Any:
        if not isinstance(block.attention, DeformableAttentionConfig):
            return block
        return replace(block, attention=replace(block.attention, offset_bound=OffsetBound.NONE))

    return replace(config, stages=tuple(tuple(map(still, blocks)) for blocks in config.stages))


def twin(recipe: TrainConfig, classes: int) -> DAT:
    """Return the twin with the first weights that the other network had, but for those of the offsets."""
    model = DAT(without_offsets(preset(recipe.model, num_classes=classes)))
    first = build_model(recipe, classes).state_dict()
    model.load_state_dict({name: first[name] for name in model.state_dict()})
    return model


def train(recipe: TrainConfig, scenes: SceneImages, held_out: SceneImages, run: Path) -> DAT:
    """Train the twin, or go on with it; return it with its best weights."""
    model = twin(recipe, len(held_out.classes))
    fit(recipe, scenes, held_out, run, model=model)
    load_checkpoint(model, run / "best.safetensors")
    return model.eval()


def compare(right: Array, twin_right: Array) -> dict[str, Any]:
    """Return how often each network is right, and the difference scene by scene.

    Args:
        right, twin_right: bool (n,), on the same scenes.
    """
    return {
        "accuracy": interval(right.astype(float)),
        "twin": interval(twin_right.astype(float)),
        "difference": interval(right.astype(float) - twin_right),
        "only_right": int((right & ~twin_right).sum()),
        "only_twin_right": int((twin_right & ~right).sum()),
    }


def measure(run: Path) -> dict[str, Any]:
    """Train the twin, and return all that is measured, on all held-out scenes."""
    torch.set_num_threads(1)
    recipe = TrainConfig.from_mapping(card()["recipe"])
    scenes, held_out = data_sets(recipe)
    other = train(recipe, scenes, held_out, run)
    images, labels = zip(*(held_out[number] for number in range(len(held_out))))
    ours = create_model(NAME, checkpoint=network_path(NAME), num_classes=len(held_out.classes)).eval()
    right, twin_right = (answers(model, torch.stack(images)) == np.array(labels) for model in (ours, other))
    return {
        "command": "python -m dat_ref.experiments.twin runs/twin",
        "model": NAME,
        "recipe": asdict(recipe),
        "held_out": len(held_out),
        "parameters": {
            name: sum(leaf.numel() for leaf in model.parameters()) for name, model in (("model", ours), ("twin", other))
        },
        "versions": {"dat_ref": __version__, "torch": torch.__version__},
        "date": datetime.now(timezone.utc).date().isoformat(),
    } | compare(right, twin_right)


if __name__ == "__main__":
    keep("twin", measure(Path(sys.argv[1])))
