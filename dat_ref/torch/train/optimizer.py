"""AdamW with the parameter groups of the releases, and the moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...train_config import TrainConfig
from .finetune import layer_depths
from .sharding import shard_like

BETAS, EPSILON = (0.9, 0.999), 1e-8


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the parameters into a group with weight decay (matrices and kernels) and a group without.

    As in the releases, there is no decay on vectors (biases, norms, layer scales) and on the parameters that
    ``model.no_weight_decay()`` names (bias tables). Frozen parameters are in no group.

    With layer decay, each depth has such groups. ``lr_scale``, the factor on the learning rate, is 1 for the head and
    falls by `layer_decay` with each depth towards the image, see `layer_depths`.

    Raises:
        ConfigError: with layer decay, if the model has no ``group_matcher``.
    """
    exempt_names: set[str] = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    depths = layer_depths(model) if layer_decay < 1 else {}
    head = max(depths.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {(head, False): [], (head, True): []}
    for name, leaf in model.named_parameters():
        if leaf.requires_grad:
            exempt = leaf.ndim <= 1 or name in exempt_names
            groups.setdefault((depths.get(name, head), exempt), []).append(leaf)
    return [
        {
            "params": groups[depth, exempt],
            "weight_decay": 0.0 if exempt else weight_decay,
            "lr_scale": layer_decay ** (head - depth),
        }
        for depth, exempt in sorted(groups)
    ]


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Create AdamW for the parameters of a model."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=EPSILON)


class ModelEma:
    """Exponential moving average of the weights of a model; it is evaluated and saved instead of the last weights.

        a ← a + (1 - d) (w - a),      d = min(decay, (1 + t) / (10 + t)) at step t

    The smaller d of the first steps reduces the influence of the initialization.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after a step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, leaf in model.named_parameters():
            self.weights[name].lerp_(leaf.detach(), 1 - decay)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Load a saved average."""
        for name, weight in self.weights.items():
            weight.copy_(shard_like(weights[name], weight))
