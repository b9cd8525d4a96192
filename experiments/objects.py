"""Objects on photographs: `dat_spot` trained with its offsets, and with three controls.

    python -m experiments.objects runs/objects --jobs 2    # an interrupted call continues where it stopped

Each position off the object has to name it (8 kinds, or nothing), from 16 keys a group. What theory allows:

==================  ====================================================================================
arm                 highest accuracy
==================  ====================================================================================
offsets             100 %: a point can go anywhere in its cell, ± s/2 = 1 cell
no offsets          h + (1 - h)/9 with h the share of scenes whose object a key sees. A key sees 19 × 19 image pixels
                    of its cell of 40 × 40. Counting every object that reaches into them (`touching`), h is an upper
                    bound; counting those whose center is in them (`center`), a rule of thumb: half an object names it
average pooling     100 %, if the features of one object can be read from the mean over a cell of 10 × 10 positions
more keys           as without offsets, with half the stride: four times the keys, 15 × 15 of 20 × 20 pixels
==================  ====================================================================================

All arms have the same training configuration, scenes and number of steps, and seeds of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dat_ref import __version__
from dat_ref._checks import Array
from dat_ref.data import network_path
from dat_ref.layer import LayerTrace
from dat_ref.ops.grid import key_grid_size, reference_points, to_pixels
from dat_ref.peers import ATTENTIONS, matched_peer
from dat_ref.presets import PRESETS
from dat_ref.scenes import Scene, Scenes
from dat_ref.scenes.measures import points_on_mask, received
from dat_ref.state_files import atomic_write
from dat_ref.torch import DAT, as_numpy
from dat_ref.torch.checkpoints import load_checkpoint
from dat_ref.torch.offset_ablation import ABLATIONS, ablated_offsets, mean_offsets
from dat_ref.torch.train import SceneImages, TrainConfig, build_datasets, build_model, fit, preset
from dat_ref.torch.train.evaluate import correct_predictions

from . import rounded, save_results

ARMS = {"offsets": "", "no offsets": "no_offsets", "average pooling": "average_pool", "more keys": "more_keys"}
SEEDS = {"offsets": 5, "no offsets": 3, "average pooling": 3, "more keys": 3}  # with offsets, seed 0 ships
BATCH = 64
LOOKED_AT = 1024  # scenes whose points and attention are measured
RADII = ((0.05, 0.063), (0.063, 0.077), (0.077, 0.09))  # bins of the object's radius, in sides of the image
SEEN = 11  # image pixels that a position sees beyond its own 4 × 4: 15 × 15 before the deformable layer


# ------------------------------------------------------------------------------------------------ training


def config_of(arm: str, seed: int) -> TrainConfig:
    """Return the training configuration of a run."""
    return preset("dat_spot", attention=ARMS[arm], seed=seed)


def folder_of(runs: Path, arm: str, seed: int) -> Path:
    """Return the folder of a run."""
    return runs / f"{arm.replace(' ', '_')}-{seed}"


def run(runs: Path, arm: str, seed: int, compiled: bool) -> None:
    """Train and measure one network, unless that is done already."""
    torch.set_num_threads(1)
    folder = folder_of(runs, arm, seed)
    if (folder / "measured.json").exists():
        return
    config = replace(config_of(arm, seed), compile=compiled)
    train, held_out = build_datasets(config)
    model = build_model(config, len(held_out.classes))
    fit(config, train, held_out, folder, model=model, quiet=True)
    with atomic_write(folder / "measured.json") as path:
        result = measure(load_run(folder), held_out_scenes(), ARMS[arm], RADII, LOOKED_AT)
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"{arm}, seed {seed}: done", flush=True)


# ------------------------------------------------------------------------------------------------ measurements


def load_run(folder: Path) -> DAT:
    """Return the network of a run, with its best weights."""
    config = TrainConfig.from_json((folder / "train_config.json").read_text(encoding="utf-8"))
    scenes = Scenes(config.task, objects=config.objects)
    model = build_model(config, len(scenes.classes))
    assert isinstance(model, DAT)
    load_checkpoint(model, folder / "best.safetensors")
    return model.eval()


def held_out_scenes(length: int | None = None) -> Scenes:
    """Return the scenes that all arms are measured on: one object, or none."""
    config = preset("dat_spot")
    return Scenes(config.task, "held_out", config.image_size, length=length, objects=config.objects)


@torch.no_grad()
def correct_shares(model: DAT, images: Tensor, targets: Tensor) -> Array:
    """Return for each image the share of positions off the object that are right, (N,)."""
    batches = zip(*(torch.split(each, BATCH) for each in (images, targets)))
    return np.asarray(torch.cat([correct_predictions(model(x), t) for x, t in batches]))


def measure(
    model: DAT, scenes: Scenes, kind: str, radii: Sequence[tuple[float, float]], looked_at: int
) -> dict[str, Any]:
    """Return what is measured of one run, on held-out scenes.

    Args:
        model: network of the run, in eval mode.
        scenes: one object or none on each.
        kind: kind of attention in the place of the deformable one; empty for the deformable one itself.
        radii: bins of the object's radius, in sides of the image.
        looked_at: number of scenes whose points and attention are measured.
    """
    made = list(scenes)
    data = SceneImages(scenes, reduction=model.config.reductions[-1], on_objects=0.0)
    images, targets = map(torch.stack, zip(*(data[number] for number in range(len(data)))))
    shares = correct_shares(model, images, targets)
    labels = np.array([scene.label for scene in made])
    some = np.array([bool(scene.objects) for scene in made])
    radius = np.array([scene.objects[0].radius / scenes.size if scene.objects else 0.0 for scene in made])
    result: dict[str, Any] = {
        "accuracy": float(shares.mean()),
        "with_object": float(shares[some].mean()),
        "empty": float(shares[~some].mean()),
        "by_radius": [float(shares[some & (low <= radius) & (radius < high)].mean()) for low, high in radii],
        "by_class": {name: float(shares[labels == number].mean()) for number, name in enumerate(scenes.classes)},
        "parameters": sum(leaf.numel() for leaf in model.parameters()),
    }
    if not kind:
        result["ablations"] = ablation_accuracies(model, images[some], targets[some])
    if kind != "average_pool":
        chosen = np.flatnonzero(some)[:looked_at]
        result["points"] = points_and_attention(model, images[chosen], [made[number] for number in chosen])
    return result


def ablation_accuracies(model: DAT, images: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the accuracy with other offsets than the model's own, for each kind of ablation."""
    means = mean_offsets(model, images)
    found = {}
    for kind in ABLATIONS:
        with ablated_offsets(model, kind, means):
            found[kind] = float(correct_shares(model, images, targets).mean())
    return found


@torch.no_grad()
def points_and_attention(model: DAT, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Return in how many scenes a point is on the object, and the attention that points on it receive.

    `reference`: with zero offsets. `by chance`: on the object of the next scene instead.
    """
    rows = []
    masks = [np.asarray(scene.masks.any(0)) for scene in scenes]
    reduction = model.config.reductions[-1]
    for number, image in enumerate(images):
        _, trace = model(image[None], return_trace=True)
        layer = as_numpy(trace.stages[-1].blocks[-1].attention)
        assert isinstance(layer, LayerTrace)
        on = points_on_mask(layer.points_px[0], masks[number], reduction)
        reference = points_on_mask(layer.reference_px[0], masks[number], reduction)
        chance = points_on_mask(layer.points_px[0], masks[(number + 1) % len(masks)], reduction)
        rows.append((on.any(), reference.any(), chance.any(), on.mean(), np.average(on, weights=received(layer))))
    names = ("any_on_object", "any_reference", "any_by_chance", "share_on_object", "attention_on_object")
    return dict(zip(names, np.array(rows, dtype=float).mean(0).tolist()))


def grid_views(stride: int, scenes: Scenes, seen: int = SEEN) -> dict[str, float]:
    """Return in how many scenes the object reaches into the image pixels that some key sees, and its center is in them.

    Args:
        stride: of the key grid, on the map of 4 × 4 image pixels.
        scenes: with one object or none; those without are left out.
        seen: image pixels that a position sees beyond its own 4 × 4.
    """
    side = scenes.size // 4
    kernel = stride // 2 * 2 + 1
    layer = preset_attention()
    keys = key_grid_size((side, side), kernel, stride, layer.convention)
    centers = to_pixels(reference_points(keys, layer.convention), (side, side), layer.convention)[:, 0, 0]
    spans = [(4 * np.floor(c) - seen / 2, 4 * (np.ceil(c) + 1) + seen / 2) for c in centers]  # image pixels, edges
    touching = center = count = 0
    for scene in scenes:
        if not scene.objects:
            continue
        count += 1
        mask = scene.masks[0]
        extents = [(np.flatnonzero(mask.any(axis))[0], np.flatnonzero(mask.any(axis))[-1] + 1) for axis in (1, 0)]
        touching += all(any(low < end and begin < high for low, high in spans) for begin, end in extents)
        center += all(any(low <= at + 0.5 <= high for low, high in spans) for at in scene.objects[0].center)
    return {"touching": touching / count, "center": center / count}


def preset_attention() -> Any:
    """Return the configuration of the deformable layer of `dat_spot`."""
    return PRESETS["dat_spot"].stages[0][-1].attention


# ------------------------------------------------------------------------------------------------ collection


def collect(runs: Path) -> dict[str, Any]:
    """Return the results of all runs in a folder, with the costs of the arms and what their grids see."""
    found: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        for seed in range(SEEDS[arm]):
            place = folder_of(runs, arm, seed) / "measured.json"
            if place.exists():
                found.setdefault(arm, {})[str(seed)] = json.loads(place.read_text(encoding="utf-8"))
    scenes, layer = held_out_scenes(), preset_attention()
    return {
        "command": "python -m experiments.objects runs/objects",
        "config": asdict(preset("dat_spot")),
        "held_out": len(scenes),
        "radius_bins": [[2 * scenes.size * side for side in pair] for pair in RADII],  # diameters, pixels
        "runs": found,
        "views": {"no offsets": grid_views(layer.stride, scenes), "more keys": grid_views(layer.stride // 2, scenes)},
        "layer_macs": {arm: layer_macs(arm) for arm in ARMS},
        **provenance(),
    }


def provenance() -> dict[str, Any]:
    """Return what results were computed with, and when."""
    return {
        "versions": {"dat_ref": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{platform.system()} {platform.machine()}, one thread a run",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def ship(runs: Path, results: dict[str, Any]) -> None:
    """Copy the weights of the network that ships into the package, and write its card."""
    shipped = results["runs"]["offsets"]["0"]
    card = {
        "about": "Names a small object on a photograph, at every position off it. See docs/experiments/objects.md.",
        "command": "dat-ref train --out run --preset dat_spot",
        "config": results["config"],
        "classes": list(held_out_scenes().classes),
        "parameters": shipped["parameters"],
        "accuracy": shipped["accuracy"],
        "held_out_scenes": results["held_out"],
        "accuracies": {arm: [run["accuracy"] for run in runs.values()] for arm, runs in results["runs"].items()},
        "versions": results["versions"],
        "date": results["date"],
    }
    shutil.copyfile(folder_of(runs, "offsets", 0) / "best.safetensors", network_path())
    network_path().with_suffix(".json").write_text(json.dumps(rounded(card), indent=1) + "\n", encoding="utf-8")


def layer_macs(arm: str) -> int:
    """Return the multiply-adds of an arm's attention layer on one image."""
    layer, side = preset_attention(), held_out_scenes().size // 4
    config = layer if arm == "offsets" else matched_peer(layer, (side, side), ARMS[arm])
    return int(ATTENTIONS[type(config)].macs(1, (side, side), config))


def main(arguments: Any = None) -> None:
    """Make all runs that are not made yet, and collect their results."""
    parser = argparse.ArgumentParser(prog="python -m experiments.objects", description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--collect", action="store_true", help="collect results without training")
    parser.add_argument("--ship", action="store_true", help="replace the network in dat_ref/data by seed 0")
    options = parser.parse_args(arguments)
    if not options.collect:
        jobs = [(arm, seed) for seed in range(max(SEEDS.values())) for arm in options.arms if seed < SEEDS[arm]]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            for made in [pool.submit(run, options.runs, arm, seed, options.compile) for arm, seed in jobs]:
                made.result()
    results = collect(options.runs)
    save_results("objects", results)
    if options.ship:
        ship(options.runs, results)


if __name__ == "__main__":
    main()
