"""Mixup (Zhang et al. 2018) blends pairs of images; CutMix (Yun et al. 2019) pastes a box of one into the other.

Image i of a batch is mixed with image B - 1 - i. With λ the share of the image itself, the loss for the mixed target is

    loss_i = λ · loss(logits_i, target_i) + (1 - λ) · loss(logits_i, target_{B-1-i})

also with label smoothing, because the losses are linear in their targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mix_batch(images: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, float]:
    """Mix the images of a batch, with random numbers from torch's global generator.

    Args:
        images: (B, C, H, W).
        mixup, cutmix: parameter α of λ ~ Beta(α, α); 0: off. With both, each batch uses one of them, with probability
            1/2.

    Returns:
        mixed images (B, C, H, W), and the share λ of the image itself.
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
    """Return start and end of a box side of length √(1 - λ) · `length`, clipped at the edges of the image."""
    half = round(length * math.sqrt(1 - lam)) // 2
    center = int(torch.randint(length, ()))
    return max(center - half, 0), min(center + half, length)
