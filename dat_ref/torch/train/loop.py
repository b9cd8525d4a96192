"""The training loop: one process or many, stopped and gone on with, always the same steps.

All that chance decides follows from the recipe's seed and from where a run is: the order of an epoch's images from
(seed, epoch), an image from (seed, epoch, number), stochastic depth from (seed, step, process). So a run that goes on
from a checkpoint takes the very steps that it would have taken.

    gradient of a step = Σ_images ∂loss / images of the step,

whichever process an image falls to: each adds up its own and divides by the images of all.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..._checks import ConfigError
from ...recipe import Recipe
from ...train import scheduled_rate
from .. import models
from . import checkpoint, shard
from .evaluate import Scores, evaluate, losses
from .log import Log
from .mix import mix
from .optimizer import Average, optimizer_for
from .team import Team


@dataclass(frozen=True)
class Result:
    """What a run left."""

    model: nn.Module  # with the weights that were evaluated last; cut over the processes if the recipe says so
    scores: Scores
    best: float  # held-out accuracy of the weights in best.safetensors
    steps: int


def build_model(recipe: Recipe, classes: int) -> nn.Module:
    """Return the model of a recipe with its first weights."""
    torch.manual_seed(recipe.seed)
    model = models.create_model(
        recipe.model,
        num_classes=classes,
        drop_path_rate=recipe.drop_path,
        attention=recipe.attention or None,
        img_size=recipe.image_size,
    )
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def fit(
    recipe: Recipe,
    train: Any,
    held_out: Any,
    out: Path | str,
    *,
    team: Team | None = None,
    model: nn.Module | None = None,
    on_step: Callable[[int, float], None] | None = None,
    quiet: bool = False,
    tensorboard: bool = False,
) -> Result:
    """Train; a run that was stopped goes on from the last checkpoint in its folder.

    Args:
        recipe: what to do.
        train, held_out: data sets, see `data`.
        out: folder for ``recipe.json``, ``log.csv``, checkpoints and the best weights, ``best.safetensors``.
        team: the processes that take part; this one alone if None.
        model: to train, images → logits; built by the recipe if None.
        on_step: called with each step's number and loss.
        quiet: without a progress bar.
        tensorboard: write events for TensorBoard too.

    Raises:
        ConfigError: if `out` has a run of another recipe or on other data (what differs is named), there is nothing to
            train on, or the processes do not see the same folder.
        CheckpointError: if none of the checkpoints there is whole.
    """
    if len(train) == 0 or len(held_out) == 0:
        raise ConfigError(f"data: expected images, got {len(train)} to train on and {len(held_out)} held out")
    team, folder = team or Team(), Path(out)
    state = _to_go_on_from(folder, recipe, train)
    run = _Run(recipe, model or build_model(recipe, len(train.classes)), train, team)
    if state is not None:
        run.load(state)
    _begin(folder, run)
    found = None
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(folder / "log.csv", run.step, tensorboard))) if team.leads else None
        tell = stack.enter_context(_told(run, quiet or not team.leads))
        while run.step < run.steps:
            for row, scores in _epoch(run, train, held_out):
                if log is not None:
                    log.add(**row)
                tell(row["loss"], scores)
                if on_step is not None:
                    on_step(row["step"], row["loss"])
                if scores is not None or (recipe.save_every and run.step % recipe.save_every == 0):
                    _keep(run, folder, scores)
                found = scores
    found = found or run.evaluate(held_out)  # of a run that was finished already
    run.take_average()
    return Result(run.model, found, run.best, run.step)


def _epoch(run: _Run, train: Any, held_out: Any) -> Iterator[tuple[dict[str, Any], Scores | None]]:
    """Take the steps that are left of an epoch; yield what is to be said of each, with scores after the last."""
    epoch, skipped = divmod(run.step, run.steps_an_epoch)
    train.set_epoch(epoch)
    for images, targets, whole in run.batches(train, epoch, skipped):
        loss = run.take_step(images, targets, whole)
        row: dict[str, Any] = {"step": run.step - 1, "epoch": epoch, "loss": loss, "learning_rate": run.rate}
        scores = run.evaluate(held_out) if run.step % run.steps_an_epoch == 0 else None
        if scores is not None:
            row |= {"held_out_loss": scores.loss, "held_out_accuracy": scores.accuracy}
        yield row, scores


def _to_go_on_from(folder: Path, recipe: Recipe, train: Any) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, if there is one; complain if it is of another recipe or of other data."""
    state = checkpoint.latest(folder) if folder.is_dir() else None
    if state is not None:
        changes = Recipe.from_mapping(state["recipe"]).changes(recipe)
        if changes:
            raise ConfigError(f"{folder}: holds a run of another recipe (there, here): {'; '.join(changes)}")
        data = _described(train)
        changes = [
            f"{name}: {state['data'][name]}, {here}" for name, here in data.items() if state["data"][name] != here
        ]
        if changes:
            raise ConfigError(f"{folder}: holds a run on other data (there, here): {'; '.join(changes)}")
    return state


def _described(train: Any) -> dict[str, Any]:
    return {"images": len(train), "classes": list(train.classes)}


def _begin(folder: Path, run: _Run) -> None:
    """Make the folder, once everything else is found to be right."""
    if run.team.leads:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(folder)
        checkpoint.write(folder / "recipe.json", run.recipe.to_json().encode())
    steps = torch.tensor([run.step, run.step**2], dtype=torch.float64, device=run.team.device)
    total, squares = run.team.total(steps).tolist()
    if squares * run.team.size != total**2:  # equal only if all are equal
        raise ConfigError(f"{folder}: expected one folder for all processes, and they see different checkpoints in it")


def _keep(run: _Run, folder: Path, scores: Scores | None) -> None:
    """Write a checkpoint, and the weights if they are the best so far."""
    if scores is not None and scores.accuracy > run.best:
        with run.averaged():  # written in here: a state names the model's own tensors, which change back afterwards
            weights = shard.whole(run.model.state_dict())
            written = run.team.leads and _write_weights(folder / "best.safetensors", weights, run.data["classes"])
        if run.team.total(torch.tensor(float(written), device=run.team.device)) > 0:
            run.best = scores.accuracy
    state = run.state()
    if run.team.leads:
        checkpoint.save(folder, run.step, state)


def _write_weights(place: Path, weights: dict[str, Tensor], classes: list[str]) -> bool:
    """Write weights with the names of their classes; return whether there was room."""
    from safetensors.torch import save

    plain = {name: leaf.detach().cpu().clone(memory_format=torch.contiguous_format) for name, leaf in weights.items()}
    try:
        checkpoint.write(place, save(plain, metadata={"format": "pt", "classes": json.dumps(classes)}))
    except OSError as error:
        warnings.warn(f"{place}: could not be written ({error.strerror}); the one before it stays", stacklevel=3)
        return False
    return True


class _Run:
    """Where a run is: weights, optimizer, average, step."""

    def __init__(self, recipe: Recipe, model: nn.Module, train: Any, team: Team) -> None:
        self.recipe, self.team, self.images, self.data = recipe, team, len(train), _described(train)
        self.model = model.to(team.device).train()
        team.spread(self.model)  # a model of the caller's own may have begun differently in each process
        if recipe.shard and team.size > 1:
            shard.cut(self.model, team)
        self.steps_an_epoch = -(-self.images // recipe.batch_size)
        self.steps = recipe.epochs * self.steps_an_epoch
        self.optimizer = optimizer_for(self.model, recipe)
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=recipe.amp == "float16")
        self.average = Average(self.model, recipe.ema) if recipe.ema else None
        self.step, self.best, self.rate = 0, -1.0, 0.0
        called: Any = self.model
        if team.size > 1 and not recipe.shard:
            devices = [team.device.index] if team.device.type == "cuda" else None
            called = nn.parallel.DistributedDataParallel(self.model, devices)
        self.called = torch.compile(called) if recipe.compile else called

    def batches(self, train: Any, epoch: int, skipped: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield this process's images and targets of each step to come, and how many images the step has in all."""
        generator = torch.Generator().manual_seed(_mixed(self.recipe.seed, epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        size = self.recipe.batch_size
        wholes = [order[start : start + size] for start in range(0, self.images, size)][skipped:]
        # A process for which there is no image takes one that does not count: all must take part in a step.
        mine = [whole[self.team.rank :: self.team.size] or whole[:1] for whole in wholes]
        loader = DataLoader(train, batch_sampler=mine, num_workers=self.recipe.workers)
        for (images, targets), whole in zip(loader, wholes, strict=True):
            yield images, targets, len(whole)

    def take_step(self, images: Tensor, targets: Tensor, whole: int) -> float:
        """Take one step; return the mean loss of its images, over all processes."""
        recipe, team = self.recipe, self.team
        torch.manual_seed(_mixed(recipe.seed, self.step, team.rank))
        warmup = round(recipe.warmup_epochs * self.steps_an_epoch)
        self.rate = scheduled_rate(self.step, self.steps, recipe.learning_rate, warmup, recipe.min_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        counts = whole > team.rank
        images, share = mix(images, recipe.mixup, recipe.cutmix)
        with self._autocast():
            logits = self.called(images.to(team.device))
        targets = targets.to(team.device)
        each = losses(logits, targets, recipe.label_smoothing)
        if share < 1:
            each = share * each + (1 - share) * losses(logits, targets.flip(0), recipe.label_smoothing)
        loss = each.sum() * (counts / whole)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * team.size).backward()  # gradients are averaged over processes, and are to be summed
        self.scaler.unscale_(self.optimizer)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.step += 1
        total = float(team.total(loss.detach().double()))
        if not np.isfinite(total):
            raise FloatingPointError(f"step {self.step - 1}: the loss is {total}; lower the learning rate or clip")
        return total

    def _autocast(self) -> Any:
        kind = self.recipe.amp
        return nullcontext() if kind == "none" else torch.autocast(self.team.device.type, dtype=getattr(torch, kind))

    def evaluate(self, held_out: Any) -> Scores:
        """Evaluate the averaged weights if there are any, else the last ones."""
        with self.averaged():
            return evaluate(self.model, held_out, team=self.team, workers=self.recipe.workers)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it lasts, the model has the averaged weights, if there are any."""
        if self.average is None:
            yield
            return
        own = {name: leaf.detach().clone() for name, leaf in self.model.named_parameters()}
        self.take_average()
        try:
            yield
        finally:
            self.model.load_state_dict(own, strict=False)

    def take_average(self) -> None:
        """Give the model the averaged weights for good."""
        if self.average is not None:
            self.model.load_state_dict(self.average.weights, strict=False)

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, in whole tensors. All processes must take part."""
        state = {
            "recipe": asdict(self.recipe),
            "data": self.data,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "average": self.average.weights if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return shard.whole(state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        own = self.model.state_dict()
        self.model.load_state_dict({name: shard.cut_like(leaf, own[name]) for name, leaf in state["model"].items()})
        leaves = [leaf for group in self.optimizer.param_groups for leaf in group["params"]]
        moments = {
            number: {name: shard.cut_like(value, leaves[number]) for name, value in moment.items()}
            for number, moment in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(state["average"])
        self.step, self.best = state["step"], state["best"]


def _mixed(*numbers: int) -> int:
    """Return one seed for several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _told(run: _Run, quiet: bool) -> Iterator[Callable[[float, Scores | None], None]]:
    """Yield what is told of each step: a progress bar with loss, learning rate, steps a second and the time left."""
    if quiet:
        yield lambda loss, scores: None
        return
    from tqdm import tqdm

    with tqdm(total=run.steps, initial=run.step, unit="step", mininterval=0.5) as bar:
        told: dict[str, str] = {}

        def tell(loss: float, scores: Scores | None) -> None:
            told.update(loss=f"{loss:.3f}", lr=f"{run.rate:.1e}")
            if scores is not None:
                told["held out"] = f"{100 * scores.accuracy:.1f} %"
            bar.set_postfix(told)
            bar.update()

        yield tell
