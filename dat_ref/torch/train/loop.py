"""The training loop: one process or many, stopped and gone on with, always the same steps.

All that chance decides follows from the config's seed and from where a run is: the order of an epoch's images from
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
from ..._deprecation import deprecated_keywords
from ...train import scheduled_rate
from ...train_config import CONFIG_FILE, TrainConfig
from .. import models
from . import checkpoint, sharding
from .distributed import DistributedContext
from .evaluate import Scores, evaluate, per_sample_loss
from .log import Log
from .mixup import mix_batch
from .optimizer import ModelEma, create_optimizer


@dataclass(frozen=True)
class Result:
    """What a run left."""

    model: nn.Module  # with the weights that were evaluated last; sharded over the processes if the config says so
    scores: Scores
    best: float  # held-out accuracy of the weights in best.safetensors
    steps: int


@deprecated_keywords(recipe="config")
def build_model(config: TrainConfig, classes: int) -> nn.Module:
    """Return the model of a config with its initial weights."""
    torch.manual_seed(config.seed)
    model = models.create_model(
        config.model,
        num_classes=classes,
        drop_path_rate=config.drop_path,
        attention=config.attention or None,
        init=config.init or None,
        img_size=config.image_size,
        global_pool=None if config.data == "scenes" else "avg",  # a folder has one class per image
    )
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


@deprecated_keywords(recipe="config", team="context")
def fit(
    config: TrainConfig,
    train: Any,
    held_out: Any,
    out: Path | str,
    *,
    context: DistributedContext | None = None,
    model: nn.Module | None = None,
    on_step: Callable[[int, float], None] | None = None,
    quiet: bool = False,
    tensorboard: bool = False,
) -> Result:
    """Train; a run that was stopped goes on from the last checkpoint in its folder.

    Args:
        config: what to do.
        train, held_out: data sets, see `data`.
        out: folder for ``train_config.json``, ``log.csv``, checkpoints and the best weights, ``best.safetensors``.
        context: the processes that take part; this one alone if None.
        model: to train, images → logits; built from the config if None.
        on_step: called with each step's number and loss.
        quiet: without a progress bar.
        tensorboard: write events for TensorBoard too.

    Raises:
        ConfigError: if `out` has a run with another config or on other data (what differs is named), there is nothing
            to train on, or the processes do not see the same folder.
        CheckpointError: if none of the checkpoints there is whole.
    """
    if len(train) == 0 or len(held_out) == 0:
        raise ConfigError(f"data: expected images, got {len(train)} to train on and {len(held_out)} held out")
    context, folder = context or DistributedContext(), Path(out)
    state = _load_resume_state(folder, config, train)
    run = _Run(config, model or build_model(config, len(train.classes)), train, context)
    if state is not None:
        run.load(state)
    _prepare_folder(folder, run)
    last_scores = None
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(folder / "log.csv", run.step, tensorboard))) if context.is_main else None
        report = stack.enter_context(_progress_bar(run, quiet or not context.is_main))
        while run.step < run.steps:
            for row, scores in _epoch(run, train, held_out):
                if log is not None:
                    log.add(**row)
                report(row["loss"], scores)
                if on_step is not None:
                    on_step(row["step"], row["loss"])
                if scores is not None or (config.save_every and run.step % config.save_every == 0):
                    _save(run, folder, scores)
                last_scores = scores
    last_scores = last_scores or run.evaluate(held_out)  # of a run that was finished already
    run.load_ema()
    return Result(run.model, last_scores, run.best, run.step)


def _epoch(run: _Run, train: Any, held_out: Any) -> Iterator[tuple[dict[str, Any], Scores | None]]:
    """Take the steps that are left of an epoch; yield what is to be said of each, with scores after the last."""
    epoch, skipped = divmod(run.step, run.steps_per_epoch)
    train.set_epoch(epoch)
    for images, targets, batch_size in run.batches(train, epoch, skipped):
        loss = run.train_step(images, targets, batch_size)
        row: dict[str, Any] = {"step": run.step - 1, "epoch": epoch, "loss": loss, "learning_rate": run.rate}
        scores = run.evaluate(held_out) if run.step % run.steps_per_epoch == 0 else None
        if scores is not None:
            row |= {"held_out_loss": scores.loss, "held_out_accuracy": scores.accuracy}
        yield row, scores


def _load_resume_state(folder: Path, config: TrainConfig, train: Any) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, if there is one; complain if it has another config or other data."""
    state = checkpoint.load_latest(folder) if folder.is_dir() else None
    if state is not None:
        changes = TrainConfig.from_mapping(state["config"]).changes(config)
        if changes:
            raise ConfigError(f"{folder}: holds a run with another config (there, here): {'; '.join(changes)}")
        data = _data_summary(train)
        changes = [
            f"{name}: {state['data'][name]}, {current}"
            for name, current in data.items()
            if state["data"][name] != current
        ]
        if changes:
            raise ConfigError(f"{folder}: holds a run on other data (there, here): {'; '.join(changes)}")
    return state


def _data_summary(train: Any) -> dict[str, Any]:
    return {"images": len(train), "classes": list(train.classes)}


def _prepare_folder(folder: Path, run: _Run) -> None:
    """Make the folder, once everything else is found to be right."""
    if run.context.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_partial(folder)
        checkpoint.write_atomic(folder / CONFIG_FILE, run.config.to_json().encode())
    steps = torch.tensor([run.step, run.step**2], dtype=torch.float64, device=run.context.device)
    total, squares = run.context.all_reduce_sum(steps).tolist()
    if squares * run.context.world_size != total**2:  # equal only if all are equal
        raise ConfigError(f"{folder}: expected one folder for all processes, and they see different checkpoints in it")


def _save(run: _Run, folder: Path, scores: Scores | None) -> None:
    """Write a checkpoint, and the weights if they are the best so far."""
    if scores is not None and scores.accuracy > run.best:
        with run.ema_weights():  # written in here: a state names the model's own tensors, which change back afterwards
            weights = sharding.gather_full(run.model.state_dict())
            written = run.context.is_main and _write_weights(folder / "best.safetensors", weights, run.data["classes"])
        if run.context.all_reduce_sum(torch.tensor(float(written), device=run.context.device)) > 0:
            run.best = scores.accuracy
    state = run.state()
    if run.context.is_main:
        checkpoint.save(folder, run.step, state)


def _write_weights(path: Path, weights: dict[str, Tensor], classes: list[str]) -> bool:
    """Write weights with the names of their classes; return whether there was room."""
    from safetensors.torch import save

    plain = {name: leaf.detach().cpu().clone(memory_format=torch.contiguous_format) for name, leaf in weights.items()}
    try:
        checkpoint.write_atomic(path, save(plain, metadata={"format": "pt", "classes": json.dumps(classes)}))
    except OSError as error:
        warnings.warn(f"{path}: could not be written ({error.strerror}); the one before it stays", stacklevel=3)
        return False
    return True


class _Run:
    """Where a run is: weights, optimizer, average, step."""

    def __init__(self, config: TrainConfig, model: nn.Module, train: Any, context: DistributedContext) -> None:
        self.config, self.context, self.num_images, self.data = config, context, len(train), _data_summary(train)
        self.model = model.to(context.device).train()
        context.broadcast(self.model)  # a model of the caller's own may have begun differently in each process
        if config.shard and context.world_size > 1:
            sharding.shard(self.model, context)
        self.steps_per_epoch = -(-self.num_images // config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.optimizer = create_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=config.amp == "float16")
        self.ema = ModelEma(self.model, config.ema) if config.ema else None
        self.step, self.best, self.rate = 0, -1.0, 0.0
        forward: Any = self.model
        if context.world_size > 1 and not config.shard:
            devices = [context.device.index] if context.device.type == "cuda" else None
            forward = nn.parallel.DistributedDataParallel(self.model, devices)
        self.forward = torch.compile(forward) if config.compile else forward

    def batches(self, train: Any, epoch: int, skipped: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield this process's images and targets of each step to come, and how many images the step has in all."""
        generator = torch.Generator().manual_seed(_derive_seed(self.config.seed, epoch))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        size = self.config.batch_size
        global_batches = [order[start : start + size] for start in range(0, self.num_images, size)][skipped:]
        # A process for which there is no image takes one that does not count: all must take part in a step.
        local_batches = [batch[self.context.rank :: self.context.world_size] or batch[:1] for batch in global_batches]
        loader = DataLoader(train, batch_sampler=local_batches, num_workers=self.config.workers)
        for (images, targets), batch in zip(loader, global_batches, strict=True):
            yield images, targets, len(batch)

    def train_step(self, images: Tensor, targets: Tensor, batch_size: int) -> float:
        """Take one step; return the mean loss of its images, over all processes."""
        config, context = self.config, self.context
        torch.manual_seed(_derive_seed(config.seed, self.step, context.rank))
        warmup = round(config.warmup_epochs * self.steps_per_epoch)
        self.rate = scheduled_rate(self.step, self.steps, config.learning_rate, warmup, config.min_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        has_images = batch_size > context.rank
        images, lam = mix_batch(images, config.mixup, config.cutmix)
        with self._autocast():
            logits = self.forward(images.to(context.device))
        targets = targets.to(context.device)
        sample_losses = per_sample_loss(logits, targets, config.label_smoothing)
        if lam < 1:
            sample_losses = lam * sample_losses + (1 - lam) * per_sample_loss(
                logits, targets.flip(0), config.label_smoothing
            )
        loss = sample_losses.sum() * (has_images / batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(
            loss * context.world_size
        ).backward()  # gradients are averaged over processes, and are to be summed
        self.scaler.unscale_(self.optimizer)
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.step += 1
        total = float(context.all_reduce_sum(loss.detach().double()))
        if not np.isfinite(total):
            raise FloatingPointError(f"step {self.step - 1}: the loss is {total}; lower the learning rate or clip")
        return total

    def _autocast(self) -> Any:
        kind = self.config.amp
        return nullcontext() if kind == "none" else torch.autocast(self.context.device.type, dtype=getattr(torch, kind))

    def evaluate(self, held_out: Any) -> Scores:
        """Evaluate the averaged weights if there are any, else the last ones."""
        with self.ema_weights():
            return evaluate(self.model, held_out, context=self.context, workers=self.config.workers)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """While it lasts, the model has the averaged weights, if there are any."""
        if self.ema is None:
            yield
            return
        own = {name: leaf.detach().clone() for name, leaf in self.model.named_parameters()}
        self.load_ema()
        try:
            yield
        finally:
            self.model.load_state_dict(own, strict=False)

    def load_ema(self) -> None:
        """Give the model the averaged weights for good."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.weights, strict=False)

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, in whole tensors. All processes must take part."""
        state = {
            "config": asdict(self.config),
            "data": self.data,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": self.ema.weights if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return sharding.gather_full(state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        own = self.model.state_dict()
        self.model.load_state_dict(
            {name: sharding.shard_like(leaf, own[name]) for name, leaf in state["model"].items()}
        )
        leaves = [leaf for group in self.optimizer.param_groups for leaf in group["params"]]
        moments = {
            index: {name: sharding.shard_like(value, leaves[index]) for name, value in moment.items()}
            for index, moment in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load(state["ema"])
        self.step, self.best = state["step"], state["best"]


def _derive_seed(*values: int) -> int:
    """Return one seed for several numbers."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _progress_bar(run: _Run, quiet: bool) -> Iterator[Callable[[float, Scores | None], None]]:
    """Yield what is told of each step: a progress bar with loss, learning rate, steps a second and the time left."""
    if quiet:
        yield lambda loss, scores: None
        return
    from tqdm import tqdm

    with tqdm(total=run.steps, initial=run.step, unit="step", mininterval=0.5) as bar:
        postfix: dict[str, str] = {}

        def report(loss: float, scores: Scores | None) -> None:
            postfix.update(loss=f"{loss:.3f}", lr=f"{run.rate:.1e}")
            if scores is not None:
                postfix["held out"] = f"{100 * scores.accuracy:.1f} %"
            bar.set_postfix(postfix)
            bar.update()

        yield report
