"""What the networks of `study` cost: parameters, multiply-adds, peak memory and time of a training step.

    python -m dat_ref.experiments.costs # five minutes or so, on a machine at rest

Steps are those of the study: 32 images of 48 × 48, float32, one thread. Times are medians; networks take turns, so that
whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

from .. import __version__
from ..bench.memory import extra_bytes
from ..bench.timing import median_seconds
from ..complexity import backbone_cost
from ..torch.train.evaluate import per_sample_loss
from ..torch.train.optimizer import create_optimizer
from . import save_results
from .models import SIDE, variants
from .study import RECIPE, Plan

ROUNDS = 25


def training_step(name: str, batch: int) -> Callable[[], object]:
    """Return a step of a network on random images."""
    model = Plan(name, 0).network().train()
    optimizer = create_optimizer(model, RECIPE)
    images = torch.randn(batch, 3, SIDE, SIDE)
    targets = torch.arange(batch) % model.num_classes

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        per_sample_loss(model(images), targets).mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        optimizer.step()

    return step


def warmup_and_step(name: str) -> list[Callable[[], object]]:
    """Return a step of one image, for what only a first step needs, and the study's."""
    return [training_step(name, 1), training_step(name, RECIPE.batch_size)]


def measure() -> dict[str, Any]:
    """Return the costs of all networks, by name."""
    torch.set_num_threads(1)
    networks = variants()
    steps = {name: training_step(name, RECIPE.batch_size) for name in networks}
    for step in steps.values():
        step()
    seconds, rounds = median_seconds(steps, ROUNDS, "cpu")
    rows = {}
    for name, variant in networks.items():
        cost = backbone_cost(1, (SIDE, SIDE), variant.config)
        rows[name] = {
            "parameters": cost.total.parameters,
            "macs": cost.total.macs,
            "bytes": extra_bytes("cpu", 1, warmup_and_step, name),
            "seconds": seconds[name],
        }
    return {
        "command": "python -m dat_ref.experiments.costs",
        "rounds": rounds,
        "batch_size": RECIPE.batch_size,
        "versions": {"dat_ref": __version__, "torch": torch.__version__},
        "machine": f"{platform.system()} {platform.machine()}, one thread",
        "networks": rows,
    }


if __name__ == "__main__":
    save_results("costs", measure())
