"""Evaluation: loss and accuracy, each image once, in one process or several."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..._deprecation import deprecated_keywords
from .data import worker_errors
from .distributed import DistributedContext


class Scores(NamedTuple):
    """Result of `evaluate`."""

    loss: float  # mean over images
    accuracy: float  # share of correctly classified images; with several classes per image, all must be correct
    images: int


def per_sample_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of each image.

    Cross-entropy; mean binary cross-entropy if an image can have several classes; for a map of logits the cross-entropy
    with weighted targets, -Σ t · log softmax(logits).

    Args:
        logits: (B, classes), or (B, classes, H, W).
        targets: int64 (B,); float32 (B, classes) of zeros and ones; or t, float32 (B, classes, H, W), with sum 1 for
            each image, see `dat_ref.scenes.position_targets`.

    Returns:
        (B,), float32 or wider.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if targets.ndim == 4:
        smooth = targets * (1 - label_smoothing) + targets.mean(1, keepdim=True) * label_smoothing
        return -(smooth * logits.log_softmax(1)).sum((1, 2, 3))
    smooth = targets * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, smooth.to(logits.dtype), reduction="none").mean(1)


def correct_predictions(logits: Tensor, targets: Tensor) -> Tensor:
    """Return a mask of correctly classified images, (B,) bool; for a map of logits the correct share of its weight."""
    if targets.ndim == 1:
        return logits.argmax(1) == targets
    if targets.ndim == 4:
        predicted = logits.argmax(1, keepdim=True)
        return (targets.gather(1, predicted) > 0).mul(targets.sum(1, keepdim=True)).sum((1, 2, 3))
    return ((logits > 0) == (targets > 0.5)).all(1)


@deprecated_keywords(team="context")
@torch.no_grad()
def evaluate(
    model: nn.Module, data: Any, *, batch_size: int = 128, context: DistributedContext | None = None, workers: int = 0
) -> Scores:
    """Evaluate a model in eval mode, and restore its mode.

    Args:
        model: images (B, 3, H, W) → logits (B, classes).
        data: data set, see `data`.
        batch_size: images per batch and process.
        context: distributed context; its processes share the images. None: this process alone.
        workers: data loading processes.

    Raises:
        ValueError: if there are no images, or `batch_size` is below 1.
        ConfigError: if an image cannot be read.
        ChildProcessError: if a data loading process was killed.
    """
    if len(data) == 0:
        raise ValueError("data: expected at least one image, got none")
    context = context or DistributedContext(device=next(model.parameters()).device)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    local_indices = range(context.rank, len(data), context.world_size)
    starts = range(0, -(-len(data) // context.world_size), batch_size)  # of the first process; no other has more
    batches = [list(local_indices[start : start + batch_size]) for start in starts]
    # With sharded weights all processes must take part: one without images takes one that is not counted.
    padded_batches = [batch or [0] for batch in batches]
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=context.device)
    loader = DataLoader(data, batch_sampler=padded_batches, num_workers=workers)
    try:
        with worker_errors():
            for (images, targets), batch in zip(loader, batches):
                logits = model(images.to(context.device))
                targets = targets.to(context.device)
                sums[0] += per_sample_loss(logits, targets).double()[: len(batch)].sum()
                sums[1] += correct_predictions(logits, targets)[: len(batch)].sum()
                sums[2] += len(batch)
    finally:
        model.train(was_training)
    loss, correct, images = context.all_reduce_sum(sums).tolist()
    return Scores(loss / images, correct / images, int(images))
