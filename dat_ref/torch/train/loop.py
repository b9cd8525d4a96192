"""Training loop: single- or multi-process, resumable, bit-reproducible.

All random choices depend on the seed of the config and on the position in the run: the order of an epoch's images on
(seed, epoch), an image on (seed, epoch, index), stochastic depth on (seed, step, process). So a run that resumes from a
checkpoint takes exactly the steps that it would have taken without the stop.

    gradient of a step = Σ_images ∂loss / (number of images of the step, over all processes)

Each process sums over its own images and divides by the number of images of all processes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..._checks import CheckpointError, ConfigError
from ..._deprecation import deprecated_keywords
from ...checkpoints import LoadReport
from ...train import scheduled_rate
from ...train_config import CONFIG_FILE, TrainConfig
from .. import models
from ..offset_adapters import offset_layers
from ..offset_log import OffsetLog
from . import checkpoint, sharding
from .data import worker_errors
from .distributed import DistributedContext
from .evaluate import Scores, evaluate, per_sample_loss
from .finetune import freeze_stages, load_initial_weights
from .log import Log, import_summary_writer
from .mixup import mix_batch
from .optimizer import ModelEma, create_optimizer
from .run_folder import check_folder, locked_folder

BEST_FILE = "best.safetensors"  # in the folder of a run
OFFSET_STEPS = 50  # steps between rows of the log with the offsets, besides the last of each epoch
MAX_CHANGES = 8  # differences that a message lists
# Fields of a checkpoint and their types.
STATE_FIELDS = {
    "config": dict,
    "data": dict,
    "step": int,
    "best": float,
    "model": dict,
    "ema": dict,
    "optimizer": dict,
    "scaler": dict,
}


@dataclass(frozen=True)
class Result:
    """Result of a run."""

    model: nn.Module  # with the weights of the last evaluation; sharded over the processes if the config says so
    scores: Scores
    best: float  # held-out accuracy of the weights in best.safetensors; -1 if none could be saved
    steps: int
    saved_steps: int = -1  # steps up to the last checkpoint in the folder; fewer than `steps` if the disk was full


@deprecated_keywords(recipe="config")
def build_model(config: TrainConfig, classes: int) -> nn.Module:
    """Build the model of a config with its initial weights."""
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
    on_init: Callable[[LoadReport], None] | None = None,
    quiet: bool = False,
    tensorboard: bool = False,
) -> Result:
    """Train a model. A run that was stopped resumes from the last checkpoint in its folder.

    The folder is locked for the time of the call: a second run in it is refused. A run that resumes does not read
    ``config.init_from`` again.

    Args:
        config: training config.
        train, held_out: data sets, see `data`.
        out: folder for ``train_config.json``, ``log.csv``, checkpoints and the best weights, ``best.safetensors``.
        context: distributed context; None: this process alone.
        model: model to train, images → logits; None: built from the config. ``config.init_from`` needs a `DAT`.
        on_init: called with the report on ``config.init_from`` when a run starts from it.
        on_step: called with the number and the loss of each step.
        quiet: no progress bar.
        tensorboard: write events for TensorBoard as well.

    Raises:
        ConfigError: if `out` has a run with another config or on other data (the message names the differences), or is
            in use by another run, there are no images, a picture cannot be read, a package is missing, the
            processes do not see the same folder, or random weights would be frozen.
        CheckpointError: if no checkpoint in `out` can be read, or the last one does not fit the model; or if
            ``config.init_from`` cannot be read or does not fit.
        ChildProcessError: if a data loading process was killed.
        OSError: if a file cannot be written at the start, or nothing of the run could be saved.
    """
    if len(train) == 0 or len(held_out) == 0:
        raise ConfigError(f"data: expected images, got {len(train)} to train on and {len(held_out)} held out")
    context, folder = context or DistributedContext(), Path(out)
    check_folder(folder)
    if context.is_main:
        _check_packages(progress_bar=not quiet, tensorboard=tensorboard)
    data = _data_summary(train, held_out)
    model = _initial_model(config, len(train.classes), folder, model, on_init if context.is_main else None)
    run = _Run(config, model, len(train), data, context)
    last_scores = None
    with ExitStack() as stack:
        if context.is_main:
            stack.enter_context(locked_folder(folder))
        stack.enter_context(worker_errors())
        _resume(run, folder)
        _prepare_folder(folder, run)
        log, offsets = None, None
        if context.is_main:
            if offset_layers(run.model):
                offsets = stack.enter_context(OffsetLog(run.model))
            names = offsets.names if offsets else []
            log = stack.enter_context(closing(Log(folder / "log.csv", run.step, tensorboard, names)))
        report = stack.enter_context(_progress_bar(run, quiet or not context.is_main))
        while run.step < run.steps:
            for row, scores in _epoch(run, train, held_out):
                if log is not None:
                    if offsets is not None and (scores is not None or row["step"] % OFFSET_STEPS == 0):
                        row |= offsets.scalars()
                    log.add(**row)
                report(row["loss"], scores)
                if on_step is not None:
                    on_step(row["step"], row["loss"])
                if scores is not None or (config.save_every and run.step % config.save_every == 0):
                    _save(run, folder, scores)
                last_scores = scores
        if last_scores is None:  # the run was finished before
            last_scores = run.evaluate(held_out)
            if run.best < 0:  # the weights could not be saved then
                _save(run, folder, last_scores)
        run.load_ema()
        context.barrier()  # the first process has written its last checkpoint
        saved_steps = checkpoint.latest_step(folder)
        if context.is_main and saved_steps == 0 and not (folder / BEST_FILE).is_file():
            raise OSError(f"{folder}: nothing of the run is saved: the folder was removed, or the disk is full")
    return Result(run.model, last_scores, run.best, run.step, saved_steps)


def _initial_model(
    config: TrainConfig,
    classes: int,
    folder: Path,
    model: nn.Module | None,
    on_init: Callable[[LoadReport], None] | None,
) -> nn.Module:
    """Return the given model, or the one that the config describes, with the weights that a run starts from."""
    if model is None:
        if config.frozen_stages and not config.init_from:
            raise ConfigError(
                f"frozen_stages: expected init_from as well, got {config.frozen_stages} alone: random weights would be "
                "frozen"
            )
        model = build_model(config, classes)
    if config.init_from and not checkpoint.list_checkpoints(folder):
        report = load_initial_weights(model, config)
        if on_init is not None:
            on_init(report)
    return model


def _check_packages(progress_bar: bool, tensorboard: bool) -> None:
    """Raise `ConfigError` for a missing package before the run begins."""
    needed = {"safetensors": "to save weights", **({"tqdm": "for the progress bar"} if progress_bar else {})}
    for name, purpose in needed.items():
        try:
            import_module(name)
        except ImportError as error:  # noqa: PERF203 - there are two
            raise ConfigError(f"{name} is needed {purpose}: pip install {name}") from error
    if tensorboard:
        import_summary_writer()


def _epoch(run: _Run, train: Any, held_out: Any) -> Iterator[tuple[dict[str, Any], Scores | None]]:
    """Take the remaining steps of an epoch; yield a log row for each, and the scores after the last."""
    epoch, skipped = divmod(run.step, run.steps_per_epoch)
    run.set_train_mode()
    train.set_epoch(epoch)
    for images, targets, batch_size in run.batches(train, epoch, skipped):
        loss = run.train_step(images, targets, batch_size)
        row: dict[str, Any] = {"step": run.step - 1, "epoch": epoch, "loss": loss, "learning_rate": run.rate}
        scores = run.evaluate(held_out) if run.step % run.steps_per_epoch == 0 else None
        if scores is not None:
            row |= {"held_out_loss": scores.loss, "held_out_accuracy": scores.accuracy}
        yield row, scores


def _resume(run: _Run, folder: Path) -> None:
    """Load the last checkpoint, if there is one.

    Raises:
        ConfigError: if it has another config or other data.
        CheckpointError: if it does not fit the model.
    """
    state = checkpoint.load_latest(folder) if folder.is_dir() else None
    if state is None:
        return
    _check_fields(folder, state)
    changes = TrainConfig.from_mapping(state["config"]).changes(run.config)
    if changes:
        raise ConfigError(f"{folder}: holds a run with another config (there, here): {'; '.join(changes)}")
    changes = _data_changes(state["data"], run.data)
    if changes:
        raise ConfigError(f"{folder}: holds a run on other data (there, here): {_shorten(changes)}")
    try:
        run.load(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: the checkpoint of step {state['step']} does not fit the model: {type(error).__name__}: "
            f"{reason:.300}"
        ) from error


def _check_fields(folder: Path, state: dict[str, Any]) -> None:
    missing = [name for name in STATE_FIELDS if name not in state]
    wrong = [name for name, kind in STATE_FIELDS.items() if name in state and not isinstance(state[name], kind)]
    wrong += [
        f"data.{name}" for name in ("images", "classes") if "data" not in missing + wrong and name not in state["data"]
    ]
    if missing or wrong:
        parts = [f"{text}: {', '.join(names)}" for text, names in (("missing", missing), ("invalid", wrong)) if names]
        raise CheckpointError(f"{folder}: the last checkpoint is no state of a training run ({'; '.join(parts)})")


def _data_summary(train: Any, held_out: Any) -> dict[str, Any]:
    """Return what identifies the data of a run: numbers of images, classes, and fingerprints if the data have them."""
    summary = {"images": len(train), "classes": list(train.classes), "held_out_images": len(held_out)}
    for name, data in (("train", train), ("held_out", held_out)):
        if hasattr(data, "fingerprint"):
            summary[f"{name}_files"] = data.fingerprint()
    return summary


def _data_changes(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return the differences between two summaries. Fields that one of them lacks (an earlier version) do not count.

    >>> files = {"cat": [3, "a", "b"], "dog": [2, "c", "d"]}
    >>> _data_changes({"train_files": files}, {"train_files": files | {"cat": [4, "e", "f"], "dog": [2, "c", "g"]}})
    ['train/cat: 3 pictures, 4', 'train/dog: other file contents']
    """
    changes = []
    for name in (each for each in here if each in there and there[each] != here[each]):
        if not name.endswith("_files"):
            changes.append(f"{name}: {there[name]}, {here[name]}")
            continue
        for label in sorted({*there[name], *here[name]}):
            (count, names, contents), (count_here, names_here, contents_here) = (
                files.get(label, [0, "", ""]) for files in (there[name], here[name])
            )
            where = f"{name.removesuffix('_files')}/{label}"
            if count != count_here:
                changes.append(f"{where}: {count} pictures, {count_here}")
            elif names != names_here:
                changes.append(f"{where}: other file names")
            elif contents != contents_here:
                changes.append(f"{where}: other file contents")
    return changes


def _shorten(changes: list[str]) -> str:
    """Join the first changes and count the others."""
    rest = f"; and {len(changes) - MAX_CHANGES} more" if len(changes) > MAX_CHANGES else ""
    return "; ".join(changes[:MAX_CHANGES]) + rest


def _prepare_folder(folder: Path, run: _Run) -> None:
    """Write the config, after all checks, and compare the steps of the processes."""
    if run.context.is_main:
        checkpoint.remove_partial(folder)
        checkpoint.write_atomic(folder / CONFIG_FILE, run.config.to_json().encode())
    steps = torch.tensor([run.step, run.step**2], dtype=torch.float64, device=run.context.device)
    total, squares = run.context.all_reduce_sum(steps).tolist()
    if squares * run.context.world_size != total**2:  # equal only if all are equal
        raise ConfigError(f"{folder}: expected one folder for all processes, and they see different checkpoints in it")


def _save(run: _Run, folder: Path, scores: Scores | None) -> None:
    """Write a checkpoint, and the weights if they are the best so far."""
    if scores is not None and scores.accuracy > run.best:
        with run.ema_weights():  # a state dict refers to the tensors of the model, which change back at the end
            weights = sharding.gather_full(run.model.state_dict())
            written = run.context.is_main and _write_weights(folder / BEST_FILE, weights, run.data["classes"])
        if run.context.all_reduce_sum(torch.tensor(float(written), device=run.context.device)) > 0:
            run.best = scores.accuracy
    state = run.state()
    if run.context.is_main:
        checkpoint.save(folder, run.step, state)


def _write_weights(path: Path, weights: dict[str, Tensor], classes: list[str]) -> bool:
    """Write weights with the names of their classes; return True if they could be written."""
    from safetensors.torch import save

    plain = {name: leaf.detach().cpu().clone(memory_format=torch.contiguous_format) for name, leaf in weights.items()}
    try:
        checkpoint.write_atomic(path, save(plain, metadata={"format": "pt", "classes": json.dumps(classes)}))
    except OSError as error:
        warnings.warn(f"{path}: could not be written ({error.strerror}); the one before it stays", stacklevel=3)
        return False
    return True


class _Run:
    """State of a run: weights, optimizer, moving average, step."""

    def __init__(
        self, config: TrainConfig, model: nn.Module, num_images: int, data: dict[str, Any], context: DistributedContext
    ) -> None:
        self.config, self.context, self.num_images, self.data = config, context, num_images, data
        self.model = model.to(context.device)
        self.frozen = freeze_stages(self.model, config.frozen_stages)
        self.set_train_mode()
        context.broadcast(self.model)  # a model of the caller may have different weights in each process
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

    def set_train_mode(self) -> None:
        """Set the modes of a training step: frozen modules stay in eval mode."""
        self.model.train()
        for module in self.frozen:
            module.eval()

    def batches(self, train: Any, epoch: int, skipped: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield this process's images and targets for each remaining step, and the global number of its images."""
        generator = torch.Generator().manual_seed(_derive_seed(self.config.seed, epoch))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        size = self.config.batch_size
        global_batches = [order[start : start + size] for start in range(0, self.num_images, size)][skipped:]
        # All processes must take part in a step: one without images takes one whose loss has weight 0.
        local_batches = [batch[self.context.rank :: self.context.world_size] or batch[:1] for batch in global_batches]
        loader = DataLoader(train, batch_sampler=local_batches, num_workers=self.config.workers)
        for (images, targets), batch in zip(loader, global_batches, strict=True):
            yield images, targets, len(batch)

    def train_step(self, images: Tensor, targets: Tensor, batch_size: int) -> float:
        """Take one step; return the mean loss of its images over all processes."""
        config, context = self.config, self.context
        torch.manual_seed(_derive_seed(config.seed, self.step, context.rank))
        warmup = round(config.warmup_epochs * self.steps_per_epoch)
        self.rate = scheduled_rate(self.step, self.steps, config.learning_rate, warmup, config.min_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("lr_scale", 1.0)  # absent in checkpoints of earlier versions
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
        # Gradients are averaged over the processes; the factor turns the average into a sum.
        self.scaler.scale(loss * context.world_size).backward()
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
        """Evaluate the moving average of the weights, or the last weights if there is no average."""
        with self.ema_weights():
            return evaluate(self.model, held_out, context=self.context, workers=self.config.workers)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give the model the averaged weights, if there are any, inside the context."""
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
        """Give the model the averaged weights permanently."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.weights, strict=False)

    def state(self) -> dict[str, Any]:
        """Return everything needed to resume, as full tensors. All processes must take part."""
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
        """Load a result of `state`."""
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
    """Derive one seed from several numbers."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _progress_bar(run: _Run, quiet: bool) -> Iterator[Callable[[float, Scores | None], None]]:
    """Yield a function to report each step: a progress bar with loss, learning rate, steps per second, time left."""
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
