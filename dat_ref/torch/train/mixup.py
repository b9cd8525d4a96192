"""Mixing the images of a batch: mixup blends two (Zhang et al. 2018), CutMix pastes a part of one (Yun et al. 2019).

The image at place i meets the one at place B - 1 - i. With λ the share that an image keeps,

    loss_i = λ · loss(logits_i, target_i) + (1 - λ) · loss(logits_i, target_{B-1-i})

is the loss for the mixed target, label smoothing included: losses here are linear in their targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mix_batch(images: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, float]:
    """Mix a batch; what chance decides comes from torch's own generator.

    Args:
        images: (B, C, H, W).
        mixup, cutmix: α of λ ~ Beta(α, α) of either; 0 for without. With both, a coin decides for each batch.

    Returns:
        new images, and the share λ that each kept of its own.
    """
    use_cutmix = cutmix > 0 and (mixup == 0 or float(torch.rand(())) < 0.5)
    alpha = cutmix if use_cutmix else mixup
    if alpha == 0:
        return images, 1.0
    lam = float(torch.distributions.Beta(alpha, alpha).sample())
    flipped = images.flip(0)
    if not use_cutmix:
        return lam * images + (1 - lam) * flipped, lam
    height, width = images.shape[2:]
    top, bottom = _cutmix_interval(height, lam)
    left, right = _cutmix_interval(width, lam)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = flipped[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _cutmix_interval(length: int, lam: float) -> tuple[int, int]:
    """Return from where to where a box reaches that would cover √(1 - share) of a side, but for the image's edge."""
    half = round(length * math.sqrt(1 - lam)) // 2
    center = int(torch.randint(length, ()))
    return max(center - half, 0), min(center + half, length)
