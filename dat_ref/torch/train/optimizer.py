"""AdamW as the releases use it: what decays, and the average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...train_config import TrainConfig
from .sharding import shard_like

BETAS, EPSILON = (0.9, 0.999), 1e-8


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Cut the parameters in two: matrices and kernels, which decay, and what the releases exempt.

    Exempt are vectors (biases, norms, layer scales) and what ``model.no_weight_decay()`` names: the bias tables.
    """
    exempt_names: set[str] = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, leaf in model.named_parameters():
        if leaf.requires_grad:
            (no_decay if leaf.ndim <= 1 or name in exempt_names else decay).append(leaf)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over a model's parameters."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=EPSILON)


class ModelEma:
    """The exponential moving average of a model's weights: what is evaluated and kept instead of the last ones.

        a ← a + (1 - d) (w - a),      d = min(decay, (1 + t) / (10 + t)) at step t,

    so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, leaf in model.named_parameters():
            self.weights[name].lerp_(leaf.detach(), 1 - decay)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over an average."""
        for name, weight in self.weights.items():
            weight.copy_(shard_like(weights[name], weight))
