"""Is the network that ships better than a baseline, trained from nothing with the same recipe but without offsets?

    python -m dat_ref.experiments.no_offset_baseline runs/no_offset_baseline     # an hour on one thread; a stopped one
    goes on

The baseline's points stay at rest; all else is the same: recipe, first weights, scenes and their order, and which
epoch's weights count (the most accurate one's). One network of each kind: what another seed changes is not measured
here.
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
from ..config import DATConfig, DeformableAttentionConfig, OffsetBound
from ..data import NETWORK, network_card, network_path
from ..presets import config as preset
from ..recipe import Recipe
from ..torch import DAT, create_model
from ..torch.checkpoints import load_checkpoint
from ..torch.train import SceneImages, build_datasets, fit
from ..torch.train.loop import build_model
from . import save_results
from .measures import interval
from .offset_ablation import predict


def without_offsets(config: DATConfig) -> DATConfig:
    """Return a network whose deformable layers leave their points at rest."""

    def disable_offsets(block: Any) -> Any:
        if not isinstance(block.attention, DeformableAttentionConfig):
            return block
        return replace(block, attention=replace(block.attention, offset_bound=OffsetBound.NONE))

    return replace(config, stages=tuple(tuple(map(disable_offsets, blocks)) for blocks in config.stages))


def baseline(recipe: Recipe, classes: int) -> DAT:
    """Return the baseline with the first weights that the other network had, but for those of the offsets."""
    model = DAT(without_offsets(preset(recipe.model, num_classes=classes)))
    initial_state = build_model(recipe, classes).state_dict()
    model.load_state_dict({name: initial_state[name] for name in model.state_dict()})
    return model


def train(recipe: Recipe, scenes: SceneImages, held_out: SceneImages, run: Path) -> DAT:
    """Train the baseline, or go on with it; return it with its best weights."""
    model = baseline(recipe, len(held_out.classes))
    fit(recipe, scenes, held_out, run, model=model)
    load_checkpoint(model, run / "best.safetensors")
    return model.eval()


def compare(correct: Array, baseline_correct: Array) -> dict[str, Any]:
    """Return how often each network is right, and the difference scene by scene.

    Args:
        correct, baseline_correct: bool (n,), on the same scenes.
    """
    return {
        "accuracy": interval(correct.astype(float)),
        "baseline": interval(baseline_correct.astype(float)),
        "difference": interval(correct.astype(float) - baseline_correct),
        "only_model_right": int((correct & ~baseline_correct).sum()),
        "only_baseline_right": int((baseline_correct & ~correct).sum()),
    }


def measure(run: Path) -> dict[str, Any]:
    """Train the baseline, and return all that is measured, on all held-out scenes."""
    torch.set_num_threads(1)
    recipe = Recipe.from_mapping(network_card()["recipe"])
    scenes, held_out = build_datasets(recipe)
    baseline_model = train(recipe, scenes, held_out, run)
    images, labels = zip(*(held_out[number] for number in range(len(held_out))))
    trained = create_model(NETWORK, checkpoint=network_path(NETWORK), num_classes=len(held_out.classes)).eval()
    correct, baseline_correct = (
        predict(model, torch.stack(images)) == np.array(labels) for model in (trained, baseline_model)
    )
    return {
        "command": "python -m dat_ref.experiments.no_offset_baseline runs/no_offset_baseline",
        "model": NETWORK,
        "recipe": asdict(recipe),
        "held_out": len(held_out),
        "parameters": {
            name: sum(leaf.numel() for leaf in model.parameters())
            for name, model in (("model", trained), ("baseline", baseline_model))
        },
        "versions": {"dat_ref": __version__, "torch": torch.__version__},
        "date": datetime.now(timezone.utc).date().isoformat(),
    } | compare(correct, baseline_correct)


if __name__ == "__main__":
    save_results("no_offset_baseline", measure(Path(sys.argv[1])))
