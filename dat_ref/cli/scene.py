"""The trained network that ships, on a scene that it has not seen: what it says is there, and where it looks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import DAT
from .. import config as preset
from ..checkpoints import load_params
from ..data import NETWORK, network_card, network_path
from ..scenes import KINDS, Scene, Scenes
from ..scenes.measures import shares_of_layer
from .explanation import Explanation, explain
from .photo import normalise, resize

NAME = NETWORK
SIDE = 64  # pixels of the scenes that it was trained on
STAGE, BLOCK = 2, 4  # which is drawn: the last of its stage, where attention finds the object most
SHOWN = 512  # pixels at which figures show a scene
NAMED = 3  # answers that are told


@dataclass(frozen=True)
class SceneExplanation:
    """What the network made of one scene."""

    number: int
    scene: Scene
    answers: dict[str, float]  # probability of each kind
    on_object: float  # share of the drawn block's points whose nearest pixel is the object's
    at_rest: float  # the same for the reference points
    attended: float  # share of all queries' attention that points on the object get
    explanation: Explanation


def explain_scene(number: int) -> SceneExplanation:
    """Run the network on a held-out scene.

    Raises:
        ConfigError: if pillow is not there.
    """
    scene = Scenes("which", "held_out", SIDE).scene(number)
    config = preset(NAME, num_classes=len(KINDS))
    params, _ = load_params(network_path(NAME), config)
    model = DAT(config, params)
    image = normalise(scene.image / 255)
    steps = list(model.walk(image))
    logits = model.classify(model.pool(steps[-1].output))[0]
    weights = np.exp(logits - logits.max())
    answers = dict(zip(KINDS, (weights / weights.sum()).tolist()))
    explanation = explain(iter(steps), config, STAGE, BLOCK)
    trace, reduction = explanation.trace, SIDE / explanation.trace.x.shape[-1]
    return SceneExplanation(
        number, scene, answers, *shares_of_layer(trace, scene.masks[0], reduction), explanation=explanation
    )


def draw(found: SceneExplanation, folder: Path) -> list[Path]:
    """Write the figures and return their paths."""
    from .. import viz

    return [viz.save(figure, folder / f"scene_{name}.png") for name, figure in figures(found).items()]


def figures(found: SceneExplanation) -> dict[str, Any]:
    """Draw where the points went, and where the object's middle and the farthest corner look."""
    from .. import viz

    picture = resize(found.scene.image / 255, (SHOWN, SHOWN))
    trace, label = found.explanation.trace, f"{NAME}, trained: stage {STAGE}, block {found.explanation.block}"
    map_size = trace.x.shape[2:]
    on_it = [int((at + 0.5) * cells / SIDE) for at, cells in zip(found.scene.objects[0].center, map_size)]
    away = [0 if at >= cells / 2 else cells - 1 for at, cells in zip(on_it, map_size)]
    queries = [(on_it[0], on_it[1]), (away[0], away[1])]
    return {
        "points": viz.draw_points(picture, trace, label=label),
        "attention": viz.draw_attention(
            picture,
            np.array(queries, dtype=float),
            [viz.deformable_query_attention(trace, query) for query in queries],
            [viz.window_query_attention(found.explanation.local_trace, query) for query in queries],
            map_size=map_size,
            label=label,
            names=("Deformable attention", "Window attention"),
        ),
    }


def facts(found: SceneExplanation) -> dict[str, Any]:
    """Return what was found, as JSON can hold it."""
    return {
        "model": NAME,
        "scene": found.number,
        "object": found.scene.objects[0].kind,
        "answers": found.answers,
        "points_on_object": found.on_object,
        "reference_points_on_object": found.at_rest,
        "attention_on_object": found.attended,
        "trained": network_card(),
    }


def text(found: SceneExplanation) -> str:
    """Return what was found, for people."""
    best = sorted(found.answers.items(), key=lambda answer: -answer[1])[:NAMED]
    sees = ", ".join(f"{kind} {share:.0%}" for kind, share in best)
    there, right = found.scene.objects[0].kind, network_card()["accuracy"]
    points = f"{found.on_object:.0%} lie on the object ({found.at_rest:.0%} before they moved)"
    return (
        f"{NAME}, trained, on held-out scene {found.number}: it sees {sees}\n"
        f"there is a {there}; it names {right:.1%} of all held-out scenes rightly\n"
        f"of the points of stage {STAGE}, block {BLOCK}, {points}; they get {found.attended:.0%} of the attention"
    )
