"""Fine-tuning: weights of a checkpoint, frozen stages, depth of each parameter for layer-wise learning rates."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from ..._checks import ConfigError
from ...checkpoints import LoadReport
from ...train_config import TrainConfig
from ..backbone import DAT
from ..checkpoints import load_checkpoint

_MERGED = 99999  # timm's mark of a group that has the depth of the group before it


def load_initial_weights(model: nn.Module, config: TrainConfig) -> LoadReport:
    """Load the weights of ``config.init_from`` into a model. Bias tables are resized, and a head may be new.

    Raises:
        CheckpointError: if the file cannot be read or does not fit; with the report. The model is unchanged.
        OSError: if the file cannot be opened.
    """
    return load_checkpoint(model, config.init_from, new_head=True, prefix=config.init_prefix or None)  # type: ignore[arg-type]


def freeze_stages(model: nn.Module, count: int) -> list[nn.Module]:
    """Freeze the patch embedding and the first `count` stages of a backbone; with 0 nothing.

    Returns:
        the frozen modules. The caller keeps them in eval mode, without stochastic depth and dropout.

    Raises:
        ConfigError: if the model is no backbone, or has fewer stages.
    """
    if count == 0:
        return []
    if not isinstance(model, DAT):
        raise ConfigError(f"frozen_stages: expected a dat_ref.torch.DAT, got {type(model).__name__}")
    if count > len(model.stages):
        raise ConfigError(f"frozen_stages: expected at most {len(model.stages)}, the stages of the model, got {count}")
    # The downsampling in front of the first stage that is trained is trained with it.
    frozen = [*model.patch_embedding, *model.stages[:count], *model.downsamples[: count - 1]]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter: 0 for the patch embedding, one more per block, downsampling and head.

    The rule is timm's, with the patterns of ``model.group_matcher()``: the final norm has the depth of the last block.

    Raises:
        ConfigError: if the model has no ``group_matcher``.

    >>> from dat_ref.torch import create_model
    >>> depths = layer_depths(create_model("dat_spot", num_classes=2))
    >>> [depths[f"{name}.weight"] for name in ("patch_embedding.1.norm", "stages.0.blocks.1.norm2", "norm", "head")]
    [0, 2, 2, 3]
    """
    if not hasattr(model, "group_matcher"):
        raise ConfigError(f"layer_decay: expected a model with group_matcher(), got {type(model).__name__}")
    matcher: Any = model.group_matcher()  # type: ignore[operator]
    rules = [
        (re.compile(pattern), order, suffix or ())
        for order, rule in enumerate(matcher.values())
        for pattern, suffix in ([(rule, None)] if isinstance(rule, str) else rule)
    ]

    def position(name: str) -> tuple[float, ...]:
        for pattern, order, suffix in rules:
            if found := pattern.match(name):
                return (order, *map(int, found.groups()), *suffix)
        return (math.inf,)  # the head

    positions = {name: position(name) for name, _ in model.named_parameters()}
    depths: dict[tuple[float, ...], int] = {}
    for each in sorted(set(positions.values())):
        merged = bool(depths) and each[-1] == _MERGED
        depths[each] = max(depths.values(), default=-1) + (not merged)
    return {name: depths[each] for name, each in positions.items()}
