"""Takes over a run of dat_nano: its best weights, how good they are, and whether its points went to the objects.

    dat-ref train --out run --threads 1 --workers 1 --amp bfloat16
    python docs/figures/nano_card.py run

writes dat_ref/data/dat_nano.safetensors and dat_nano.json.
"""

import json
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from dat_ref import __version__
from dat_ref.data import network_path
from dat_ref.experiments.measures import interval, shift_fraction
from dat_ref.experiments.recording import attention_traces
from dat_ref.layer import LayerTrace
from dat_ref.scenes import Scenes
from dat_ref.scenes.measures import shares_of_layer
from dat_ref.torch import create_model
from dat_ref.torch.train import SceneImages, evaluate
from dat_ref.torch.train.data import normalised
from dat_ref.train_config import TrainConfig

SCENES = 512  # that points are looked for on


def object_shares(model, size):
    """Return, for each deformable block, what share of points and of attention is on the object, over scenes; and how
    much of the offsets is one shift for each group, the same at all places of all scenes."""
    scenes = Scenes("which", "held_out", size)
    shares, offsets = {}, {}
    for number in range(SCENES):
        scene = scenes[number]
        for block, reduction, trace in attention_traces(model, normalised(scene.image)[None]):
            if isinstance(trace, LayerTrace):
                shares.setdefault(block, []).append(shares_of_layer(trace, scene.masks[0], reduction))
                offsets.setdefault(block, []).append(trace.points_px[0] - trace.reference_px[0])
    return {
        name: summary(np.array(rows)) | {"one_shift": shift_fraction(np.array(offsets[name]))}
        for name, rows in shares.items()
    }


def summary(rows):
    """Return intervals of the shares, and of the differences, scene by scene."""
    points, reference, attention = rows.T
    return {
        "points": interval(points),
        "without_offsets": interval(reference),
        "points_minus_without": interval(points - reference),
        "attention": interval(attention),
        "attention_minus_points": interval(attention - points),
    }


def main(folder):
    """Take over the run in a folder."""
    recipe = TrainConfig.from_json((folder / "recipe.json").read_text(encoding="utf-8"))
    weights_path = network_path(recipe.model)
    shutil.copyfile(folder / "best.safetensors", weights_path)
    held_out = SceneImages(Scenes(recipe.task, "held_out", recipe.image_size))
    model = create_model(recipe.model, checkpoint=weights_path, num_classes=len(held_out.classes)).eval()
    scores = evaluate(model, held_out)
    card = {
        "about": "Names the one object on a scene of dat_ref.scenes. A toy, for looking at: it knows nothing else.",
        "command": "dat-ref train --out run --threads 1 --workers 1 --amp bfloat16",
        "recipe": json.loads(recipe.to_json()),
        "classes": list(held_out.classes),
        "parameters": sum(leaf.numel() for leaf in model.parameters()),
        "accuracy": scores.accuracy,
        "loss": scores.loss,
        "held_out_scenes": scores.images,
        "versions": {"dat_ref": __version__, "torch": torch.__version__},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "points_measured_on": SCENES,
        "on_the_object": object_shares(model, recipe.image_size),
    }
    weights_path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
