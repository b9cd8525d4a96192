"""Where the networks of `study` look: their points, and their attention, against the masks of the objects.

    python -m dat_ref.experiments.attention_maps runs     # two minutes or so

All numbers are means over held-out scenes, one for each run; how sure they are is told by the spread over seeds. Runs
whose weights are not in the folder keep what was measured of them before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import Array
from ..layer import LayerTrace
from ..peers.neighborhood import NeighborhoodTrace
from ..peers.window import WindowTrace
from ..scenes.measures import on_image, received, share_on_mask
from ..torch import DAT
from ..torch.checkpoints import load_checkpoint
from ..torch.train.data import normalised
from ..viz import QueryAttention, deformable_query_attention, neighborhood_query_attention, window_query_attention
from . import load_results, save_results
from .measures import COLUMNS, distance_to_mask, group_metrics, shift_fraction
from .models import BASE, MULTI_OBJECT, NO_OFFSETS
from .recording import attention_traces
from .study import CHECKPOINT_STEPS, Plan, from_record, plans, study_scenes

SCENES = 256
POINT_RUNS = (BASE, "zero start", "s = 1", "s = 4", "clamp", "1 group", "a group a head", NO_OFFSETS)
QUERY_ATTENTION: dict[type, Callable[..., QueryAttention]] = {
    LayerTrace: deformable_query_attention,
    WindowTrace: window_query_attention,
    NeighborhoodTrace: neighborhood_query_attention,
}
ATTENTION_RUNS = (BASE, NO_OFFSETS, "window", "shifted_window", "neighborhood")
MULTI_OBJECT_RUN = BASE + MULTI_OBJECT


def image_trace(trace: LayerTrace, index: int) -> Any:
    """Return what the measures of one image ask of a trace."""
    reference = trace.reference_px
    return SimpleNamespace(
        points_px=trace.points_px[index : index + 1],
        reference_px=reference[index : index + 1] if len(reference) > 1 else reference,
        attention=trace.attention[index : index + 1],
    )


# ------------------------------------------------------------------------------------------------ points


def point_metrics(model: DAT, images: Tensor, masks: Array) -> dict[str, Any]:
    """Return for each layer and group the means of `COLUMNS`, how far its points move, and their `shift_fraction`.

    Points that move to where objects are more often, whatever the scene, come to lie on more of them. So there is also
    the share of a scene's points that lie on another scene's object, ``by_chance``.

    Args:
        model: whose attention is deformable.
        images: (B, 3, H, W).
        masks: bool (B, H, W): what counts as the object.
    """
    results = {}
    other_masks = (masks.sum(0) - masks) / max(
        len(masks) - 1, 1
    )  # (B, H, W): how often a pixel is another scene's object
    for layer, reduction, trace in attention_traces(model, images):
        rows = [group_metrics(image_trace(trace, index), mask, reduction) for index, mask in enumerate(masks)]
        means = np.array(rows).mean(0)  # (G, 5)
        shares = [
            [share_on_mask(group, other, reduction) for group in points]
            for points, other in zip(trace.points_px, other_masks)
        ]
        chance = np.mean(shares, axis=0)  # (G,)
        displacements = trace.points_px - trace.reference_px  # (B, G, Hk, Wk, 2)
        results[layer] = [
            dict(
                zip(COLUMNS, map(float, row)),
                by_chance=float(chance[group]),
                shift_fraction=shift_fraction(displacements[:, group : group + 1]),
                displacement=float(np.sqrt((displacements[:, group] ** 2).sum(-1).mean())) * reduction,
            )
            for group, row in enumerate(means)
        ]
    return results


# ------------------------------------------------------------------------------------------------ several objects


def assign_objects(trace: Any, masks: Array, reduction: int) -> dict[str, list[int]]:
    """Return which group each object of an image falls to: the one whose point is nearest, the one that attends most.

    Args:
        trace: of one image, see `image_trace`.
        masks: bool (objects, H, W).
    """
    points, attention = trace.points_px[0], received(trace)
    nearest = [[distance_to_mask(group, mask, reduction).min() for group in points] for mask in masks]
    attends = [
        [share_on_mask(group, mask, reduction, weights) for group, weights in zip(points, attention)] for mask in masks
    ]
    return {
        "nearest": [int(np.argmin(row)) for row in nearest],
        "most_attention": [int(np.argmax(row)) for row in attends],
    }


def separation_rate(assignments: list[list[int]]) -> dict[str, float]:
    """Return how often two objects of one scene fall to different groups, and how often two of different scenes do.

    The second is what chance gives: 1 - Σ_g p_g², p_g the share of all objects that falls to group g.

    Args:
        assignments: for each scene the group of each of its objects.

    >>> separation_rate([[0, 1], [1, 0]])
    {'observed': 1.0, 'by_chance': 0.5}
    """
    pairs = [first != second for scene in assignments for first, second in combinations(scene, 2)]
    _, counts = np.unique(np.concatenate([np.array(scene, int) for scene in assignments]), return_counts=True)
    return {"observed": float(np.mean(pairs)), "by_chance": float(1 - ((counts / counts.sum()) ** 2).sum())}


def group_separation(model: DAT, images: Tensor, masks: list[Array]) -> dict[str, Any]:
    """Return for each layer what `separation_rate` says of its groups, on scenes with two objects or more."""
    results = {}
    indices = [index for index, each in enumerate(masks) if len(each) > 1]
    for layer, reduction, trace in attention_traces(model, images):
        assignments = [assign_objects(image_trace(trace, index), masks[index], reduction) for index in indices]
        results[layer] = {
            how: separation_rate([each[how] for each in assignments]) for how in ("nearest", "most_attention")
        }
    return results


# ------------------------------------------------------------------------------------------------ attention


def attention_metrics(model: DAT, images: Tensor, masks: Array) -> dict[str, Any]:
    """Return for each layer where the queries on an object and the others attend.

        distance = mean_q Σ_k A_qk |k - q|,  in pixels of the image;   foreground = mean_q Σ_k A_qk [k on the object]
        uniform  = the same share, if a query attended to all that it sees alike

    Args:
        model: deformable, window or neighborhood attention in all its blocks.
        images: (B, 3, H, W).
        masks: bool (B, H, W).
    """
    results = {}
    for layer, reduction, trace in attention_traces(model, images):
        query_attention = QUERY_ATTENTION[type(trace)]
        rows, columns = (side // reduction for side in model.config.image_size)
        cells = np.moveaxis(np.mgrid[:rows, :columns], 0, -1).reshape(-1, 2)
        values: dict[bool, list[tuple[float, ...]]] = {True: [], False: []}
        for index, mask in enumerate(masks):
            y, x = np.rint(on_image(cells, reduction)).astype(int).T
            for query, on in zip(cells, mask[y, x]):
                weights, keys = query_attention(trace, tuple(query), index)
                distance = float(weights @ np.linalg.norm(keys - query, axis=-1)) * reduction
                values[bool(on)].append(
                    (distance, share_on_mask(keys, mask, reduction, weights), share_on_mask(keys, mask, reduction))
                )
        names = ("distance", "foreground", "uniform")
        results[layer] = {
            "from_object": dict(zip(names, map(float, np.mean(values[True], axis=0)))),
            "from_elsewhere": dict(zip(names, map(float, np.mean(values[False], axis=0)))),
        }
    return results


# ------------------------------------------------------------------------------------------------ all runs


def held_out_images(task: str, count: int = SCENES) -> tuple[Tensor, list[Array]]:
    """Return the first held-out scenes' images (B, 3, H, W), and for each the masks of its objects."""
    scenes = study_scenes(task, "held_out")
    drawn = [scenes[index] for index in range(count)]
    return torch.stack([normalised(scene.image) for scene in drawn]), [scene.masks for scene in drawn]


def load_run(plan: Plan, runs: Path, step: int | None = None) -> DAT:
    """Return a run's network after a step, with its first weights after step 0; at the end if None."""
    model = plan.network()
    if step != 0:
        name = "weights" if step is None else f"after-{step:05}"
        load_checkpoint(model, plan.folder(runs) / f"{name}.safetensors")
    return model.eval()


def measure(runs: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that is measured, by what was measured, network and seed.

    Args:
        runs: the folder of the runs.
        record: what this returned before. It stands for the runs that are not in the folder.

    Raises:
        ConfigError: if a run is neither there nor on record.
    """
    torch.set_num_threads(1)
    images, masks = held_out_images("which")
    single_masks = np.array([each[0] for each in masks])
    multi_images, multi_masks = held_out_images("which_all")
    union_masks = np.array([each.any(0) for each in multi_masks])
    steps = (0, *(step for step in CHECKPOINT_STEPS if step <= 2000))
    experiments: dict[str, tuple[tuple[str, ...], Callable[[Plan], Mapping[str, Any]]]] = {
        "points": (POINT_RUNS, lambda plan: point_metrics(load_run(plan, runs), images, single_masks)),
        "training": (
            (BASE,),
            lambda plan: {str(step): point_metrics(load_run(plan, runs, step), images, single_masks) for step in steps},
        ),
        "attention": (
            ATTENTION_RUNS,
            lambda plan: attention_metrics(load_run(plan, runs), images[:128], single_masks[:128]),
        ),
        "multi_object_points": (
            (MULTI_OBJECT_RUN,),
            lambda plan: point_metrics(load_run(plan, runs), multi_images, union_masks),
        ),
        "multi_object_groups": (
            (MULTI_OBJECT_RUN,),
            lambda plan: group_separation(load_run(plan, runs), multi_images, multi_masks),
        ),
    }
    results: dict[str, Any] = {"command": "python -m dat_ref.experiments.attention_maps runs", "scenes": SCENES}
    for experiment, (names, measure_run) in experiments.items():
        print(experiment, flush=True)
        results[experiment] = {name: {} for name in names}
        for plan in plans():
            if plan.name in names:
                available = (plan.folder(runs) / "weights.safetensors").exists()
                results[experiment][plan.name][str(plan.seed)] = (
                    measure_run(plan) if available else from_record(record, experiment, plan)
                )
    return results


if __name__ == "__main__":
    save_results("attention_maps", measure(Path(sys.argv[1]), load_results("attention_maps")))
