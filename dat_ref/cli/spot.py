"""Answers and points of the network that ships, on scenes or on a photograph with objects placed on it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import DAT, ConfigError
from .. import config as preset
from .._checks import Array
from ..backbone import Step
from ..checkpoints import load_params
from ..data import NETWORK, network_card, network_path
from ..layer import LayerTrace
from ..peers import replace_attention
from ..scenes import OBJECTS, Placed, Scenes, paint, position_targets
from ..scenes.measures import points_on_mask, received
from .photo import input_size, normalise, resize

SIDE = 160  # pixels of the images that the network was trained on
SHOWN = 480  # pixels of a picture in a figure
SCENES = (58, 54, 47, 8, 33, 12)  # one object, two, six, none
NAMED = 0.15  # smallest probability of an answer that is printed
RADIUS = 0.06  # of a placed object, in short sides of the photograph
_PLACE = re.compile(r"(?P<kind>[a-z]+)@(?P<y>[0-9.]+),(?P<x>[0-9.]+)(,(?P<radius>[0-9.]+))?")


@dataclass(frozen=True)
class Sighting:
    """The network's result on one picture."""

    name: str
    picture: Array  # (H, W, 3) in [0, 1], for figures
    objects: tuple[str, ...]
    answers: dict[str, float]  # probability of each class, mean over the positions off the objects
    answers_zero_offsets: dict[str, float]  # the same weights with zero offsets
    points: int
    points_on_objects: int
    reference_points_on_objects: int
    attention_on_objects: float  # share of the attention that points on objects receive
    trace: LayerTrace
    trace_zero_offsets: LayerTrace


# ------------------------------------------------------------------------------------------------ the network


@cache
def load_network(zero_offsets: bool = False) -> DAT:
    """Return the network that ships, or the same weights with zero offsets."""
    config = preset(NETWORK, num_classes=len(network_card()["classes"]))
    params, _ = load_params(network_path(), config)
    if not zero_offsets:
        return DAT(config, params)
    del params["stages"][0]["blocks"][-1]["attention"]["offset_network"]
    return DAT(replace_attention(config, "no_offsets"), params)


def _run(model: DAT, image: Array) -> tuple[Array, LayerTrace]:
    """Return the probabilities of each class at each position, (classes, H, W), and the deformable layer's trace."""
    steps: list[Step] = list(model.walk(image))
    logits = model.classify(model.pool(steps[-1].output))[0]
    weights = np.exp(logits - logits.max(0))
    trace = steps[-1].trace.attention
    assert isinstance(trace, LayerTrace)
    return weights / weights.sum(0), trace


def look(name: str, image: Array, masks: Array, objects: Sequence[str], picture: Array) -> Sighting:
    """Run the network on a picture.

    Args:
        name: of the picture.
        image: (H, W, 3) in [0, 1], at the size of the network's input.
        masks: bool (objects, H, W).
        objects: kinds.
        picture: the same picture at any size, for figures.
    """
    classes = network_card()["classes"]
    fed = normalise(image)
    probabilities, trace = _run(load_network(), fed)
    probabilities_zero, trace_zero = _run(load_network(zero_offsets=True), fed)
    reduction = load_network().config.reductions[-1]
    off_objects = position_targets(0, 1, masks, reduction, on_objects=0.0)[0]  # weights with sum 1
    any_object = np.asarray(masks.any(0))
    on, reference_on = (
        points_on_mask(each[0], any_object, reduction) for each in (trace.points_px, trace.reference_px)
    )  # (G, Hk, Wk)
    return Sighting(
        name=name,
        picture=picture,
        objects=tuple(objects),
        answers=_mean_answers(classes, probabilities, off_objects),
        answers_zero_offsets=_mean_answers(classes, probabilities_zero, off_objects),
        points=on.size,
        points_on_objects=int(on.sum()),
        reference_points_on_objects=int(reference_on.sum()),
        attention_on_objects=float(np.average(on, weights=received(trace))),
        trace=trace,
        trace_zero_offsets=trace_zero,
    )


def _mean_answers(classes: Sequence[str], probabilities: Array, weights: Array) -> dict[str, float]:
    return dict(zip(classes, (probabilities * weights).sum((1, 2)).tolist()))


# ------------------------------------------------------------------------------------------------ pictures


def look_at_scene(number: int) -> Sighting:
    """Run the network on a held-out scene with none to six objects.

    Raises:
        ConfigError: if pillow is not installed.
    """
    scene, shown = (Scenes("find_all", "held_out", side, objects="pictures").scene(number) for side in (SIDE, SHOWN))
    kinds = [each.kind for each in scene.objects]
    return look(f"scene {number}", scene.image / 255, scene.masks, kinds, shown.image / 255)


@dataclass(frozen=True)
class Placement:
    """An object to place on a photograph."""

    kind: str
    y: float  # pixels of the photograph
    x: float
    radius: float | None


def parse_place(text: str) -> Placement:
    """Parse ``NAME@y,x`` or ``NAME@y,x,radius``."""
    found = _PLACE.fullmatch(text)
    kinds = OBJECTS["pictures"].kinds
    if not found or found["kind"] not in kinds:
        raise argparse.ArgumentTypeError(
            f"expected NAME@y,x in pixels of the photograph, such as giraffe@120,200, with NAME one of "
            f"{', '.join(kinds)}, got {text!r}"
        )
    try:
        radius = None if found["radius"] is None else float(found["radius"])
        return Placement(found["kind"], float(found["y"]), float(found["x"]), radius)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers after @, got {text!r}") from None


def look_at_photo(name: str, photo: Array, placements: Sequence[Placement], seed: int = 0) -> Sighting:
    """Run the network on a photograph with objects placed on it.

    Args:
        name: of the photograph.
        photo: (H, W, 3) in [0, 1].
        placements: kinds and positions of the objects.
        seed: of their hue, brightness and mirroring.

    Raises:
        ConfigError: if an object's center is outside the photograph, or it is too small or too large to be seen.
    """
    height, width = photo.shape[:2]
    short = min(height, width)
    canvas = photo.astype(np.float64).copy()
    masks = np.zeros((len(placements), height, width), bool)
    generator = np.random.default_rng(seed)
    for place, mask in zip(placements, masks):
        radius = RADIUS * short if place.radius is None else place.radius
        if not (0 <= place.y < height and 0 <= place.x < width):
            raise ConfigError(
                f"--place: expected y,x inside the {height}×{width} photograph, got {place.y:g},{place.x:g}"
            )
        if not 0.01 * short <= radius <= 0.5 * short:
            raise ConfigError(
                f"--place: expected a radius from {0.01 * short:.3g} to {0.5 * short:.3g} pixels, got {radius:g}"
            )
        paint(canvas, mask, Placed(place.kind, (place.y, place.x), radius, 0.0), "pictures", generator)
    fed = input_size((height, width), SIDE)
    small_masks = np.stack([resize(np.repeat(mask[..., None], 3, 2), fed)[..., 0] >= 0.5 for mask in masks])
    shown = resize(canvas, _shown_size((height, width)))
    return look(name, resize(canvas, fed), small_masks, [place.kind for place in placements], shown)


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    factor = 1.5 * SHOWN / min(size)
    return round(size[0] * factor), round(size[1] * factor)


# ------------------------------------------------------------------------------------------------ results


def draw(sightings: Sequence[Sighting], folder: Path) -> list[Path]:
    """Write the two figures, with the offsets and with zero offsets, and return their paths."""
    from ..viz import ScenePanel, draw_scenes, save

    trained = "Trained, on pictures it has not seen. " if sightings[0].name.startswith("scene") else "Trained. "
    with_offsets = draw_scenes(
        [ScenePanel(each.picture, each.trace, _title(each, each.answers)) for each in sightings],
        title=f"{NETWORK}: the offsets move points onto the objects",
        caption=f"{trained}Every position off the object has to name it. A key sees at most 19 × 19 of the 160 × 160 "
        "pixels, around its point: to see an object, a point has to be on it.",
    )
    zero = draw_scenes(
        [
            ScenePanel(each.picture, each.trace_zero_offsets, _title(each, each.answers_zero_offsets))
            for each in sightings
        ],
        title=f"{NETWORK} with zero offsets: the control",
        caption="The same weights and pictures. Every point stays on its reference point.",
    )
    return [save(with_offsets, folder / "objects.png"), save(zero, folder / "objects_zero_offsets.png")]


def _there(sighting: Sighting) -> str:
    return ", ".join(sighting.objects) or "empty"


def _title(sighting: Sighting, answers: dict[str, float]) -> str:
    """Return the title of a panel, short enough for its width."""
    count = len(sighting.objects)
    kind, probability = max(answers.items(), key=lambda answer: answer[1])
    return f"{_there(sighting) if count <= 2 else f'{count} objects'} → {kind} {probability:.0%}"


def _best(answers: dict[str, float]) -> str:
    """Return the answers with a probability of at least `NAMED`, at least one, the most probable first."""
    ranked = sorted(answers.items(), key=lambda answer: -answer[1])
    named = [answer for answer in ranked if answer[1] >= NAMED] or ranked[:1]
    return ", ".join(f"{name} {share:.0%}" for name, share in named)


def facts(sighting: Sighting) -> dict[str, Any]:
    """Return the result as a JSON object."""
    return {
        "picture": sighting.name,
        "objects": list(sighting.objects),
        "answers": sighting.answers,
        "answers_with_zero_offsets": sighting.answers_zero_offsets,
        "points": sighting.points,
        "points_on_objects": sighting.points_on_objects,
        "reference_points_on_objects": sighting.reference_points_on_objects,
        "attention_on_objects": sighting.attention_on_objects,
    }


def text(sightings: Sequence[Sighting]) -> str:
    """Return the results as lines of text, with the network's measured accuracy."""
    card = network_card()
    rows = [("picture", "objects", "answer", "with zero offsets", "points on objects", "attention on them")]
    rows += [
        (
            each.name,
            _there(each),
            _best(each.answers),
            _best(each.answers_zero_offsets),
            f"{each.points_on_objects} of {each.points} (zero offsets: {each.reference_points_on_objects})",
            f"{each.attention_on_objects:.0%}",
        )
        for each in sightings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    measured = f"correct at {card['accuracy']:.1%} of the positions off the object"
    return (
        f"{NETWORK}: trained weights. Names what is on a scene: one of {len(card['classes']) - 1} objects, or nothing\n"
        f"{card['held_out_scenes']} held-out scenes: {measured}\n\n"
        f"{table}"
    )
