"""One claim in search of its setting: at equal keys, 2.6 times the memory and 1.3 times the multiply-adds of DAT.

The source does not say what was compared. So the search runs through what can be meant: attention weights predicted
from the query (Deformable DETR's, or the form in which DAT's authors swapped them in) or dot products; as many keys a
query as DAT has in all, at three choices of DAT's strides; one layer or the whole of dat_tiny; with bilinear reads
counted or not. Memory is what one pass keeps for its backward, counted on arrays that were there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..complexity.counter import retained_bytes
from ..complexity.formulas import Term, attention_terms, backbone_cost, total
from ..config import DATConfig, DeformableAttentionConfig
from ..ops.grid import Size, key_grid_size
from ..ops.sampling import bilinear_sample_macs
from ..params import count, map_tree
from ..peers.dat_dcn import DATDCNAttentionConfig
from ..peers.ms_deform_attn import MultiScaleDeformableConfig
from ..peers.registry import ATTENTIONS
from ..presets import PRESETS
from .claim import Claim, Figure, Figures, Source, SourceAccess, Verdict, holds_if, not_testable
from .space import SUMMARY, noise, random_params

MEMORY, MACS = 2.6, 1.3  # as claimed
TOLERANCE = 1.05
SIDES = {2: 14, 3: 7}  # of the maps of stages 3 and 4, by index
STRIDES = ((1, 1), (2, 1), (2, 2))  # of stages 3 and 4; the first is the release's


class Ratio(NamedTuple):
    """What a per-query attention takes, over what DAT takes, under a setting."""

    design: str
    setting: str  # how much of the model, with how many keys
    sampling_macs: str
    memory: float
    macs: float

    @property
    def distance(self) -> float:
        """How far from what is claimed: the larger of the two factors."""
        return float(np.exp(np.abs(np.log([self.memory / MEMORY, self.macs / MACS])).max()))

    def __str__(self) -> str:
        return f"{self.setting}, {self.design}, {self.sampling_macs}"


PerQuery = DATDCNAttentionConfig | MultiScaleDeformableConfig


def _attentions_by_design(dim: int, heads: int, keys: int) -> dict[str, PerQuery]:
    """Return attentions in which each query has `keys` keys of its own."""
    return {
        "weights from the query": MultiScaleDeformableConfig(dim, heads, points=keys),
        "weights from the query (as swapped in)": DATDCNAttentionConfig(dim, heads, points=keys),
        "dot products": MultiScaleDeformableConfig(dim, heads, points=keys, scoring="dot_product"),
    }


def _measured_cost(config: PerQuery, size: Size) -> Term:
    """Run one layer on a map of `size` and return what it takes."""
    attention = ATTENTIONS[type(config)]
    shapes = attention.shapes(config)
    params = map_tree(lambda leaf: leaf.astype(np.float32), random_params(shapes))
    x = noise(config.dim, size).astype(np.float32)
    saved_bytes = retained_bytes(list(attention.forward(x, params, config)), exclude=[x, params])
    by_dot_product = isinstance(config, MultiScaleDeformableConfig) and config.scoring == "dot_product"
    sampled = 2 if by_dot_product else 1  # values, and keys where they are compared
    sampling_macs = sampled * bilinear_sample_macs(size[0] * size[1] * config.points, config.dim)
    return Term(count(shapes), attention.macs(1, size, config), interpolated=sampling_macs, saved_bytes=saved_bytes)


def _with_strides(strides: tuple[int, int]) -> DATConfig:
    """Return dat_tiny with other strides in stages 3 and 4, and so with other numbers of keys."""
    config = PRESETS["dat_tiny"]
    stages = list(config.stages)
    for index, stride in zip((2, 3), strides, strict=True):
        stages[index] = tuple(
            replace(block, attention=replace(block.attention, stride=stride))
            if isinstance(block.attention, DeformableAttentionConfig)
            else block
            for block in stages[index]
        )
    return replace(config, stages=tuple(stages))


def _deformable(config: DATConfig, stage: int) -> list[DeformableAttentionConfig]:
    layers = [block.attention for block in config.stages[stage]]
    return [layer for layer in layers if isinstance(layer, DeformableAttentionConfig)]


def _ratios() -> Iterator[Ratio]:
    """Yield every setting and what it gives."""
    for strides in STRIDES:
        config = _with_strides(strides)
        whole = backbone_cost(1, (224, 224), config).total
        layers = {stage: _deformable(config, stage) for stage in SIDES}
        keys: dict[int, int] = {}
        for stage, (layer, *_) in layers.items():
            grid = key_grid_size((SIDES[stage],) * 2, layer.kernel_size, layer.stride, layer.convention)
            keys[stage] = grid[0] * grid[1]
        for design in _attentions_by_design(1, 1, 1):
            replaced = whole
            for stage, side in SIDES.items():
                layer = layers[stage][0]
                original = total(attention_terms(1, (side, side), layer))
                replacement = _measured_cost(
                    _attentions_by_design(layer.dim, layer.heads, keys[stage])[design], (side, side)
                )
                yield from _ratios_of(
                    design, f"one layer of stage {stage + 1} with {keys[stage]} keys", original, replacement
                )
                for _ in layers[stage]:
                    replaced = _subtract(replaced + replacement, original)
            yield from _ratios_of(design, f"the whole of dat_tiny with {keys[2]} and {keys[3]} keys", whole, replaced)


def _subtract(left: Term, right: Term) -> Term:
    return left + Term(-right.parameters, -right.macs, -right.interpolated, -right.gathers, -right.saved_bytes)


def _ratios_of(design: str, setting: str, original: Term, replacement: Term) -> Iterator[Ratio]:
    memory = replacement.saved_bytes / original.saved_bytes
    yield Ratio(design, setting, "without bilinear reads", memory, replacement.products / original.products)
    yield Ratio(design, setting, "with bilinear reads", memory, replacement.macs / original.macs)


def measure_equal_keys() -> Figures:
    """Search the settings under which a per-query attention takes 2.6× the memory and 1.3× the multiply-adds."""
    ratios = sorted(_ratios(), key=lambda ratio: ratio.distance)
    fitting = [ratio for ratio in ratios if ratio.distance <= TOLERANCE]
    layer = next(ratio for ratio in ratios if ratio.setting.startswith("one layer of stage 3"))
    return {
        "settings": Figure(len(ratios), "settings tried"),
        "fit": Figure(len(fitting), "of these, with both factors within 5 % of 2.6 and 1.3"),
        "common": Figure("; ".join(sorted({ratio.setting for ratio in fitting})), "what these compare"),
        "scoring": Figure("; ".join(sorted({ratio.design.split(" (")[0] for ratio in fitting})), "and how they weigh"),
        "nearest": Figure(str(ratios[0]), "the nearest"),
        "memory": Figure(ratios[0].memory, "its memory: what a pass keeps for its backward, over DAT's", "times"),
        "macs": Figure(ratios[0].macs, "its multiply-adds over DAT's", "times"),
        "least": Figure(
            min((ratio.memory for ratio in fitting), default=0.0), "least memory of those that fit", "times"
        ),
        "next": Figure(str(next(r for r in ratios if r not in fitting)), "the nearest that does not fit"),
        "next_factor": Figure(next(r for r in ratios if r not in fitting).distance, "how far off it is", "times", 2),
        "layer": Figure(str(layer), "the nearest of one layer in stage 3"),
        "layer_memory": Figure(layer.memory, "its memory", "times"),
        "layer_macs": Figure(layer.macs, "its multiply-adds", "times"),
    }


def judge_equal_keys(figures: Figures) -> Verdict:
    """Holds under the one setting that gives both numbers; if none does, the source does not say what to test."""
    if not figures["fit"].value or ";" in f"{figures['common']}{figures['scoring']}":
        return not_testable("the settings that were tried do not single out what the source compared")
    return holds_if(
        f"one compares {figures['common']} a query, {figures['scoring']}, by what a pass keeps for its backward"
    )


CLAIMS = (
    Claim(
        number=16,
        title="At equal keys: 2.6 times the memory, 1.3 times the multiply-adds",
        statement="With as many keys, Deformable DETR's way takes 2.6 times the memory and 1.3 times the FLOPs of DAT.",
        sources=(Source(SUMMARY, SourceAccess.SUMMARY),),
        measure=measure_equal_keys,
        judge=judge_equal_keys,
        verdict=holds_if(
            "one compares the whole of dat_tiny with 196 and 49 keys a query, weights from the query, by what a "
            "pass keeps for its backward"
        ),
        reason=(
            "Of {settings} settings {fit} come within 5 % of both numbers, and all of them compare the same: "
            "{common} a query, which is what stages 3 and 4 have in all as released, at 224². There it is {memory} "
            "times the memory ({least} if fewer coordinates are kept) and {macs} times the multiply-adds. For a "
            "layer by itself the gap is wider, {layer_memory} and {layer_macs} times at best. That the source "
            "compared just this is likely, not known."
        ),
    ),
)
