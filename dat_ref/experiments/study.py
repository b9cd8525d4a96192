"""Trains the small network and everything that is changed in it, several seeds each, with one recipe.

    python -m dat_ref.experiments.study runs --jobs 2       # three hours on two cores; a stopped one goes on
    python -m dat_ref.experiments.study runs --collect

Each run leaves ``result.json``, ``weights.safetensors`` and, of the networks that are looked at while they learn, their
weights after some steps, in ``runs/NAME/SEED``. What they say is measured by `attention_maps` and told by `pages`.

All runs see the same scenes, each seed in an order of its own: a seed decides first weights and order.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from .. import __version__
from .._checks import ConfigError
from ..scenes import Scenes
from ..state_files import atomic_write
from ..torch import DAT
from ..torch.checkpoints import save_checkpoint
from ..torch.functional.sampling import Sampler
from ..torch.train import SceneImages, fit
from ..torch.train.data import normalised
from ..train_config import TrainConfig
from . import load_results, save_results
from .models import BASE, MULTI_OBJECT, NO_OFFSETS, SIDE, variants

SEEDS = 3  # of each network, but for those that follow
EXTRA_SEEDS = {BASE: 8, NO_OFFSETS: 8}  # the two that tell whether offsets help
SINGLE_RADIUS, MULTI_RADIUS = (0.15, 0.25), (0.13, 0.17)  # radius of one object; of up to four, which must find room
RECIPE = TrainConfig(
    model="dat_ref.experiments.models",
    image_size=SIDE,
    epochs=5,
    scenes_per_epoch=12800,
    batch_size=32,
    learning_rate=2e-3,
    warmup_epochs=0.5,
)
CHECKPOINT_STEPS = (100, 200, 400, 800, 1200, 1600, 2000, 2800, 4000)  # steps after which weights are kept
CHECKPOINTED_RUNS = (BASE, BASE + MULTI_OBJECT)  # of what weights are kept while it learns


class StoredScenes(SceneImages):
    """Scenes that were drawn once, for many runs: the same items as of `SceneImages`, read from files.

    Args:
        scenes: which ones.
        folder: where the files are; they are made if they are not there.
        epochs: for how many epochs there are scenes of their own.
    """

    def __init__(self, scenes: Scenes, folder: Path, epochs: int = 1) -> None:
        super().__init__(scenes, fresh=epochs > 1)
        count = epochs * len(scenes)
        name = f"{scenes.task}-{scenes.split}-{scenes.size}-{scenes.seed}-{count}-{scenes.radius}"
        images, labels = folder / f"{name}.images.npy", folder / f"{name}.labels.npy"
        if not labels.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _draw(scenes, count, images, labels)
        self.images, self.labels = np.load(images, mmap_mode="r"), np.load(labels)

    def _item(self, number: int) -> tuple[Tensor, Tensor]:
        return normalised(self.images[number]), torch.as_tensor(self.labels[number])


def _draw(scenes: Scenes, count: int, images: Path, labels: Path) -> None:
    """Draw scenes into files; the labels come last, and say that all is there."""
    stored = open_memmap(images, mode="w+", dtype=np.uint8, shape=(count, scenes.size, scenes.size, 3))
    scene_labels = []
    for number in range(count):
        scene = scenes.scene(number)
        stored[number] = scene.image
        scene_labels.append(scene.label)
    stored.flush()
    with atomic_write(labels) as path, open(path, "wb") as file:
        np.save(file, np.array(scene_labels))


def build_datasets(recipe: TrainConfig, folder: Path) -> tuple[StoredScenes, StoredScenes]:
    """Return what is trained on and what is held out."""
    train = study_scenes(recipe.task, "train", recipe.scenes_per_epoch)
    return StoredScenes(train, folder, recipe.epochs), StoredScenes(study_scenes(recipe.task, "held_out"), folder)


def study_scenes(task: str, split: str, length: int | None = None) -> Scenes:
    """Return the scenes of the study."""
    return Scenes(task, split, SIDE, length=length, radius=SINGLE_RADIUS if task == "which" else MULTI_RADIUS)


@dataclass(frozen=True)
class Plan:
    """One run."""

    name: str
    seed: int

    @property
    def variant(self) -> str:
        """The network's name."""
        return self.name.removesuffix(MULTI_OBJECT)

    @property
    def recipe(self) -> TrainConfig:
        """What is done; twice as long where there are several objects, which takes longer to learn."""
        changes = {"task": "which_all", "epochs": 2 * RECIPE.epochs} if self.name.endswith(MULTI_OBJECT) else {}
        return TrainConfig.from_mapping(asdict(RECIPE) | {"seed": self.seed} | changes)

    def folder(self, runs: Path) -> Path:
        """Where the run is."""
        return runs / self.name.replace(" ", "_").replace(":", "") / str(self.seed)

    def network(self) -> DAT:
        """Return the network with its first weights."""
        torch.manual_seed(self.seed)
        variant = variants()[self.variant]
        # Peers read so many samples that torch's own operator is two to three times as fast; the result is the same.
        sampler: Sampler = "grid_sample" if variant.part == "peers" else "gather"
        return DAT(variant.config, init=variant.init, sampler=sampler)


def plans() -> list[Plan]:
    """Return all runs, in the order in which they are made: one seed of everything before the next."""
    seeds = {name: EXTRA_SEEDS.get(name, SEEDS) for name in (*variants(), BASE + MULTI_OBJECT)}
    return [Plan(name, seed) for seed in range(max(seeds.values())) for name in seeds if seed < seeds[name]]


def train(plan: Plan, runs: Path) -> None:
    """Make a run, or go on with it."""
    torch.set_num_threads(1)
    folder, start = plan.folder(runs), time.perf_counter()
    if (folder / "result.json").exists():
        return
    recipe, model = plan.recipe, plan.network()
    train_set, held_out_set = build_datasets(recipe, runs / "scenes")
    on_step = _checkpointer(model, folder) if plan.name in CHECKPOINTED_RUNS else None
    result = fit(recipe, train_set, held_out_set, folder, model=model, on_step=on_step, quiet=True)
    save_checkpoint(model, folder / "weights.safetensors")
    results = asdict(plan) | {"accuracy": result.scores.accuracy, "loss": result.scores.loss}
    with atomic_write(folder / "result.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - start
    print(f"{plan.name}, seed {plan.seed}: {results['accuracy']:.1%} after {seconds:.0f} s", flush=True)


def collect(runs: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all runs found, by network and seed.

    Args:
        runs: the folder of the runs.
        record: what this returned before. It stands for the runs that are not in the folder.

    Raises:
        ConfigError: if a run is neither there nor on record, or the record is of another recipe.
    """
    if record and record["recipe"] != asdict(RECIPE):
        raise ConfigError(f"record: expected runs of the recipe {RECIPE}, got {record['recipe']}")
    results: dict[str, dict[str, Any]] = {}
    for plan in plans():
        path = plan.folder(runs) / "result.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else from_record(record, "runs", plan)
        results.setdefault(plan.name, {})[str(plan.seed)] = {name: result[name] for name in ("accuracy", "loss")}
    return {
        "command": "python -m dat_ref.experiments.study runs --jobs 2",
        "recipe": asdict(RECIPE),
        "radius": SINGLE_RADIUS,
        "held_out": len(study_scenes("which", "held_out")),
        "versions": {"dat_ref": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "variants": {name: {"part": each.part, "description": each.description} for name, each in variants().items()},
        "runs": results,
    }


def from_record(record: Mapping[str, Any], experiment: str, plan: Plan) -> Any:
    """Return what was measured before of a run that is not in the folder of runs.

    Raises:
        ConfigError: if nothing was.
    """
    try:
        return record[experiment][plan.name][str(plan.seed)]
    except KeyError:
        raise ConfigError(f"runs: expected the run {plan.name!r} with seed {plan.seed}, or one on record") from None


def _checkpointer(model: DAT, folder: Path) -> Callable[[int, float], None]:
    """Return what keeps weights after the steps that are looked at."""

    def on_step(step: int, loss: float) -> None:
        if step + 1 in CHECKPOINT_STEPS:
            save_checkpoint(model, folder / f"after-{step + 1:05}.safetensors")

    return on_step


def main(arguments: Any = None) -> None:
    """Make all runs that are not made yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="python -m dat_ref.experiments.study")
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each (all cores)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these networks")
    parser.add_argument("--collect", action="store_true", help="make none; write down what those that are there found")
    options = parser.parse_args(arguments)
    if options.collect:
        save_results("study", collect(options.runs, load_results("study")))
        return
    selected = [plan for plan in plans() if not options.only or plan.name in options.only]
    for plan in selected:
        build_datasets(plan.recipe, options.runs / "scenes")  # before several processes want to draw them
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for future in [pool.submit(train, plan, options.runs) for plan in selected]:
            future.result()


if __name__ == "__main__":
    main()
