"""Where the networks of `study` look: their points, and their attention, against the masks of the objects.

    python -m dat_ref.experiments.looks runs     # two minutes or so

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
from ..viz import Attended, deformable_attended, neighborhood_attended, window_attended
from . import keep, measured
from .measures import COLUMNS, distance_to_mask, group_rows, one_shift
from .small import BASE, SEVERAL, STILL
from .study import LOOKED_AT, Plan, on_record, plans, scenes_of
from .traces import traces

SCENES = 256
WITH_POINTS = (BASE, "zero start", "s = 1", "s = 4", "clamp", "1 group", "a group a head", STILL)
ATTENDED: dict[type, Callable[..., Attended]] = {
    LayerTrace: deformable_attended,
    WindowTrace: window_attended,
    NeighborhoodTrace: neighborhood_attended,
}
COMPARED = (BASE, STILL, "window", "shifted_window", "neighborhood")
SERVED = BASE + SEVERAL


def item(trace: LayerTrace, number: int) -> Any:
    """Return what the measures of one image ask of a trace."""
    rest = trace.reference_px
    return SimpleNamespace(
        points_px=trace.points_px[number : number + 1],
        reference_px=rest[number : number + 1] if len(rest) > 1 else rest,
        attention=trace.attention[number : number + 1],
    )


# ------------------------------------------------------------------------------------------------ points


def where_points_are(model: DAT, images: Tensor, masks: Array) -> dict[str, Any]:
    """Return for each layer and group the means of `COLUMNS`, how far its points move, and how much is `one_shift`.

    Points that move to where objects are more often, whatever the scene, come to lie on more of them. So there is also
    the share of a scene's points that lie on another scene's object, ``by_chance``.

    Args:
        model: whose attention is deformable.
        images: (B, 3, H, W).
        masks: bool (B, H, W): what counts as the object.
    """
    found = {}
    others = (masks.sum(0) - masks) / max(len(masks) - 1, 1)  # (B, H, W): how often a pixel is another scene's object
    for layer, reduction, trace in traces(model, images):
        rows = [group_rows(item(trace, number), mask, reduction) for number, mask in enumerate(masks)]
        means = np.array(rows).mean(0)  # (G, 5)
        shares = [
            [share_on_mask(group, other, reduction) for group in points]
            for points, other in zip(trace.points_px, others)
        ]
        chance = np.mean(shares, axis=0)  # (G,)
        moved = trace.points_px - trace.reference_px  # (B, G, Hk, Wk, 2)
        found[layer] = [
            dict(
                zip(COLUMNS, map(float, row)),
                by_chance=float(chance[group]),
                one_shift=one_shift(moved[:, group : group + 1]),
                moved=float(np.sqrt((moved[:, group] ** 2).sum(-1).mean())) * reduction,
            )
            for group, row in enumerate(means)
        ]
    return found


# ------------------------------------------------------------------------------------------------ several objects


def who_serves(trace: Any, masks: Array, reduction: int) -> dict[str, list[int]]:
    """Return which group each object of an image falls to: the one whose point is nearest, the one that attends most.

    Args:
        trace: of one image, see `item`.
        masks: bool (objects, H, W).
    """
    points, attention = trace.points_px[0], received(trace)
    nearest = [[distance_to_mask(group, mask, reduction).min() for group in points] for mask in masks]
    attends = [
        [share_on_mask(group, mask, reduction, weights) for group, weights in zip(points, attention)] for mask in masks
    ]
    return {"nearest": [int(np.argmin(row)) for row in nearest], "attends": [int(np.argmax(row)) for row in attends]}


def separate(served: list[list[int]]) -> dict[str, float]:
    """Return how often two objects of one scene fall to different groups, and how often two of different scenes do.

    The second is what chance gives: 1 - Σ_g p_g², p_g the share of all objects that falls to group g.

    Args:
        served: for each scene the group of each of its objects.

    >>> separate([[0, 1], [1, 0]])
    {'together': 1.0, 'by_chance': 0.5}
    """
    pairs = [one != other for scene in served for one, other in combinations(scene, 2)]
    _, counts = np.unique(np.concatenate([np.array(scene, int) for scene in served]), return_counts=True)
    return {"together": float(np.mean(pairs)), "by_chance": float(1 - ((counts / counts.sum()) ** 2).sum())}


def groups_for_objects(model: DAT, images: Tensor, masks: list[Array]) -> dict[str, Any]:
    """Return for each layer what `separate` says of its groups, on scenes with two objects or more."""
    found = {}
    chosen = [number for number, each in enumerate(masks) if len(each) > 1]
    for layer, reduction, trace in traces(model, images):
        served = [who_serves(item(trace, number), masks[number], reduction) for number in chosen]
        found[layer] = {how: separate([each[how] for each in served]) for how in ("nearest", "attends")}
    return found


# ------------------------------------------------------------------------------------------------ attention


def attention_from(model: DAT, images: Tensor, masks: Array) -> dict[str, Any]:
    """Return for each layer where the queries on an object and the others attend.

        distance = mean_q Σ_k A_qk |k - q|,  in pixels of the image;   foreground = mean_q Σ_k A_qk [k on the object]
        even     = the same share, if a query attended to all that it sees alike

    Args:
        model: deformable, window or neighborhood attention in all its blocks.
        images: (B, 3, H, W).
        masks: bool (B, H, W).
    """
    found = {}
    for layer, reduction, trace in traces(model, images):
        attended = ATTENDED[type(trace)]
        rows, columns = (side // reduction for side in model.config.image_size)
        cells = np.moveaxis(np.mgrid[:rows, :columns], 0, -1).reshape(-1, 2)
        values: dict[bool, list[tuple[float, ...]]] = {True: [], False: []}
        for number, mask in enumerate(masks):
            y, x = np.rint(on_image(cells, reduction)).astype(int).T
            for query, on in zip(cells, mask[y, x]):
                weights, keys = attended(trace, tuple(query), number)
                far = float(weights @ np.linalg.norm(keys - query, axis=-1)) * reduction
                values[bool(on)].append(
                    (far, share_on_mask(keys, mask, reduction, weights), share_on_mask(keys, mask, reduction))
                )
        names = ("distance", "foreground", "even")
        found[layer] = {
            "from_object": dict(zip(names, map(float, np.mean(values[True], axis=0)))),
            "from_elsewhere": dict(zip(names, map(float, np.mean(values[False], axis=0)))),
        }
    return found


# ------------------------------------------------------------------------------------------------ all runs


def looked_at(task: str, count: int = SCENES) -> tuple[Tensor, list[Array]]:
    """Return the first held-out scenes' images (B, 3, H, W), and for each the masks of its objects."""
    scenes = scenes_of(task, "held_out")
    made = [scenes[number] for number in range(count)]
    return torch.stack([normalised(scene.image) for scene in made]), [scene.masks for scene in made]


def weights_of(plan: Plan, runs: Path, step: int | None = None) -> DAT:
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
    images, masks = looked_at("which")
    one = np.array([each[0] for each in masks])
    several, of_several = looked_at("which_all")
    union = np.array([each.any(0) for each in of_several])
    steps = (0, *(step for step in LOOKED_AT if step <= 2000))
    looks: dict[str, tuple[tuple[str, ...], Callable[[Plan], Mapping[str, Any]]]] = {
        "points": (WITH_POINTS, lambda plan: where_points_are(weights_of(plan, runs), images, one)),
        "learning": (
            (BASE,),
            lambda plan: {str(step): where_points_are(weights_of(plan, runs, step), images, one) for step in steps},
        ),
        "attention": (COMPARED, lambda plan: attention_from(weights_of(plan, runs), images[:128], one[:128])),
        "several_points": ((SERVED,), lambda plan: where_points_are(weights_of(plan, runs), several, union)),
        "several_groups": ((SERVED,), lambda plan: groups_for_objects(weights_of(plan, runs), several, of_several)),
    }
    found: dict[str, Any] = {"command": "python -m dat_ref.experiments.looks runs", "scenes": SCENES}
    for what, (names, look) in looks.items():
        print(what, flush=True)
        found[what] = {name: {} for name in names}
        for plan in plans():
            if plan.name in names:
                there = (plan.folder(runs) / "weights.safetensors").exists()
                found[what][plan.name][str(plan.seed)] = look(plan) if there else on_record(record, what, plan)
    return found


if __name__ == "__main__":
    keep("looks", measure(Path(sys.argv[1]), measured("looks")))
