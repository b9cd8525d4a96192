"""Coloured discs on photographs: a target that is small against the cell, and how long each arm takes to learn it.

    python -m experiments.discs runs/discs --jobs 2    # an interrupted call continues where it stopped

Each position off the disc has to name its color (6 colors, or nothing), from 4 keys a group. Nothing mixes positions
before the deformable layer: a position is one patch of 4 × 4 image pixels. What theory allows:

====================  ==============================================================================================
arm                   highest accuracy
====================  ==============================================================================================
offsets               100 %: a point can go anywhere in its cell, ± s/2 = 1 cell
no offsets            h + (1 - h)/7 with h the share of scenes whose disc a key sees: 8 × 8 of 32 × 32 image pixels
average pooling       100 %, if a color can be read from the mean of 64 positions, of which a disc has 1 to 16
more keys             as without offsets, with half the stride: four times the keys, 8 × 8 of 16 × 16 pixels
… long                the same with four times the steps: what more training gives
====================  ==============================================================================================

All arms of a seed are trained on the same 32 000 scenes in the same order; the long ones see them four times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dat_ref.config import BiasKind, BlockConfig, DATConfig, DeformableAttentionConfig, WindowAttentionConfig
from dat_ref.peers import ATTENTIONS
from dat_ref.peers.matching import replace_attention
from dat_ref.scenes import Scenes
from dat_ref.state_files import atomic_write
from dat_ref.torch import DAT
from dat_ref.torch.train import SceneImages

from . import save_results
from .objects import grid_views, measure, provenance

PASS = 2000  # steps in which every scene is shown once


class Arm(NamedTuple):
    """Kind of attention (the network's own if empty), number of steps and of seeds."""

    kind: str
    steps: int = PASS
    seeds: int = 5


ARMS = {
    "offsets": Arm(""),
    "no offsets": Arm("no_offsets"),
    "average pooling": Arm("average_pool"),
    "more keys": Arm("more_keys"),
    "average pooling long": Arm("average_pool", 4 * PASS),
    "more keys long": Arm("more_keys", 4 * PASS, seeds=2),
    "offsets long": Arm("", 4 * PASS),
}
SIDE, PATCH, STRIDE = 64, 4, 8
BATCH, LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP = 16, 3e-3, 100, 0.01, 5.0
LOOKED_AT = 512  # scenes whose points and attention are measured
RADII = ((0.03, 0.06), (0.06, 0.09), (0.09, 0.125))  # bins of the disc's radius, in sides of the image


def network(arm: str) -> DATConfig:
    """Return the configuration of an arm: one block without mixing of positions, one deformable block."""
    windows = WindowAttentionConfig(24, heads=2, window_size=1)  # windows of one pixel: a projection of each position
    deformable = DeformableAttentionConfig(
        24, heads=2, groups=2, stride=STRIDE, kernel_size=STRIDE + 1, bias=BiasKind.NONE
    )
    config = DATConfig(
        stages=((BlockConfig(windows, mlp_ratio=2), BlockConfig(deformable, mlp_ratio=2)),),
        patch_embedding="patch",
        image_size=(SIDE, SIDE),
        num_classes=len(held_out_scenes().classes),
        global_pool="",
    )
    return replace_attention(config, ARMS[arm].kind) if ARMS[arm].kind else config


def held_out_scenes() -> Scenes:
    """Return the scenes that all arms are measured on: one disc, or none."""
    return Scenes("find", "held_out", SIDE, objects="discs")


# ------------------------------------------------------------------------------------------------ training


def run(runs: Path, seed: int, steps: int) -> None:
    """Train and measure the arms of a seed with this number of steps that are not done yet."""
    torch.set_num_threads(1)
    wanted = [arm for arm, each in ARMS.items() if each.steps == steps and seed < each.seeds]
    todo = [arm for arm in wanted if not place_of(runs, arm, seed).exists()]
    if not todo:
        return
    images, targets = training_set(seed)
    for arm in todo:
        model = train(arm, seed, images, targets)
        result = measure(model, held_out_scenes(), ARMS[arm].kind, RADII, LOOKED_AT)
        with atomic_write(place_of(runs, arm, seed)) as path:
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"{arm}, seed {seed}: done", flush=True)


def place_of(runs: Path, arm: str, seed: int) -> Path:
    """Return the file with the measurements of a run."""
    return runs / f"{arm.replace(' ', '_')}-{seed}.json"


def training_set(seed: int) -> tuple[Tensor, Tensor]:
    """Return the scenes of a seed and their targets, in half precision: 0.9 GB."""
    scenes = Scenes("find", "train", SIDE, seed=seed, length=PASS * BATCH, objects="discs")
    data = SceneImages(scenes, reduction=PATCH, on_objects=0.0)
    images = torch.empty(len(scenes), 3, SIDE, SIDE, dtype=torch.float16)
    targets = torch.empty(len(scenes), len(scenes.classes), SIDE // PATCH, SIDE // PATCH, dtype=torch.float16)
    for number in range(len(scenes)):
        images[number], targets[number] = data[number]
    return images, targets


def train(arm: str, seed: int, images: Tensor, targets: Tensor) -> DAT:
    """Train one arm with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    model = DAT(network(arm), init="zero_offset")
    steps = ARMS[arm].steps
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + np.cos(np.pi * step / steps)) / 2
    )
    for step in range(steps):
        batch = slice(step % PASS * BATCH, (step % PASS + 1) * BATCH)
        loss = -(targets[batch].float() * F.log_softmax(model(images[batch].float()), 1)).sum((1, 2, 3)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return model.eval()


# ------------------------------------------------------------------------------------------------ collection


def layer_macs(arm: str) -> int:
    """Return the multiply-adds of an arm's attention layer on one image."""
    config = network(arm).stages[0][-1].attention
    return int(ATTENTIONS[type(config)].macs(1, (SIDE // PATCH, SIDE // PATCH), config))


def collect(runs: Path) -> dict[str, Any]:
    """Return the results of all runs in a folder, with the costs of the arms and what their grids see."""
    found: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        for seed in range(ARMS[arm].seeds):
            if place_of(runs, arm, seed).exists():
                text = place_of(runs, arm, seed).read_text(encoding="utf-8")
                found.setdefault(arm, {})[str(seed)] = json.loads(text)
    scenes = held_out_scenes()
    return {
        "command": "python -m experiments.discs runs/discs",
        "held_out": len(scenes),
        "radius_bins": [[2 * SIDE * side for side in pair] for pair in RADII],  # diameters, pixels
        "runs": found,
        "views": {
            "no offsets": grid_views(STRIDE, scenes, seen=0),
            "more keys": grid_views(STRIDE // 2, scenes, seen=0),
        },
        "layer_macs": {arm: layer_macs(arm) for arm in ARMS},
        **provenance(),
    }


def main(arguments: Any = None) -> None:
    """Make all runs that are not made yet, and collect their results."""
    parser = argparse.ArgumentParser(prog="python -m experiments.discs", description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds at a time, one thread each")
    options = parser.parse_args(arguments)
    options.runs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        jobs = sorted({(each.steps, seed) for each in ARMS.values() for seed in range(each.seeds)})
        for made in [pool.submit(run, options.runs, seed, steps) for steps, seed in jobs]:
            made.result()
    save_results("discs", collect(options.runs))


if __name__ == "__main__":
    main()
