"""What each layer of a network did, and where the layer is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..torch import DAT, as_numpy


@torch.no_grad()
def attention_traces(model: DAT, images: Tensor) -> Iterator[tuple[str, int, Any]]:
    """Yield each block's place, its reduction and the trace of its attention, of all images together."""
    _, trace = model(images, return_trace=True)
    for stage, (blocks, reduction) in enumerate(zip(trace.stages, model.config.reductions), 1):
        for index, block in enumerate(blocks.blocks, 1):
            yield f"stage {stage}, block {index}", reduction, as_numpy(block.attention)
