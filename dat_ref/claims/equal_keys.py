"""Claim about equal keys: 2.6 times the memory and 1.3 times the multiply-adds of DAT.

The source does not state the setting of the comparison. The check therefore tries all plausible settings: attention
weights predicted from the query (as in Deformable DETR, or as in the variant of DAT's authors) or dot products; as many
keys per query as DAT has in total, at three choices of DAT's strides; one layer or the whole of dat_tiny; bilinear
sampling counted or not. Memory means the arrays that one forward pass stores for the backward pass, measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..complexity.counter import retained_bytes
from ..complexity.formulas import Term, attention_terms, backbone_cost, total
from ..config import AttentionConfig, DATConfig, DeformableAttentionConfig
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
SIDES = {2: 14, 3: 7}  # sides of the maps of stages 3 and 4, by stage index
STRIDES = ((1, 1), (2, 1), (2, 2))  # strides of stages 3 and 4; the first are the released ones


class Ratio(NamedTuple):
    """Cost of a per-query attention relative to DAT, in one setting."""

    design: str
    setting: str  # compared part of the model, and number of keys
    sampling_macs: str
    memory: float
    macs: float

    @property
    def distance(self) -> float:
        """Deviation from the claimed numbers: the larger of the two factors."""
        return float(np.exp(np.abs(np.log([self.memory / MEMORY, self.macs / MACS])).max()))

    def __str__(self) -> str:
        return f"{self.setting}, {self.design}, {self.sampling_macs}"


PerQuery = DATDCNAttentionConfig | MultiScaleDeformableConfig


def _attentions_by_design(dim: int, heads: int, keys: int) -> dict[str, PerQuery]:
    """Return attention configurations with `keys` separate keys per query."""
    return {
        "weights from the query": MultiScaleDeformableConfig(dim, heads, points=keys),
        "weights from the query (DAT's variant)": DATDCNAttentionConfig(dim, heads, points=keys),
        "dot products": MultiScaleDeformableConfig(dim, heads, points=keys, scoring="dot_product"),
    }


def _measured_cost(config: PerQuery, size: Size) -> Term:
    """Run one layer on a map of `size` and return its cost."""
    attention = ATTENTIONS[type(config)]
    shapes = attention.shapes(config)
    params = map_tree(lambda leaf: leaf.astype(np.float32), random_params(shapes))
    x = noise(config.dim, size).astype(np.float32)
    saved_bytes = retained_bytes(list(attention.forward(x, params, config)), exclude=[x, params])
    by_dot_product = isinstance(config, MultiScaleDeformableConfig) and config.scoring == "dot_product"
    sampled = 2 if by_dot_product else 1  # values, and for dot products also keys
    sampling_macs = sampled * bilinear_sample_macs(size[0] * size[1] * config.points, config.dim)
    return Term(count(shapes), attention.macs(1, size, config), interpolated=sampling_macs, saved_bytes=saved_bytes)


def _with_strides(strides: tuple[int, int]) -> DATConfig:
    """Return dat_tiny with other strides in stages 3 and 4, and therefore other numbers of keys."""

    def restride(attention: AttentionConfig, stage: int) -> AttentionConfig:
        if isinstance(attention, DeformableAttentionConfig):  # in stages 3 and 4 only
            return replace(attention, stride=strides[stage - 2])
        return attention

    return PRESETS["dat_tiny"].map_attention(restride)


def _deformable(config: DATConfig, stage: int) -> list[DeformableAttentionConfig]:
    layers = [block.attention for block in config.stages[stage]]
    return [layer for layer in layers if isinstance(layer, DeformableAttentionConfig)]


def _ratios() -> Iterator[Ratio]:
    """Yield the ratios of every setting."""
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
    yield Ratio(design, setting, "without bilinear sampling", memory, replacement.products / original.products)
    yield Ratio(design, setting, "with bilinear sampling", memory, replacement.macs / original.macs)


def measure_equal_keys() -> Figures:
    """Search for settings in which a per-query attention needs 2.6× the memory and 1.3× the multiply-adds."""
    ratios = sorted(_ratios(), key=lambda ratio: ratio.distance)
    fitting = [ratio for ratio in ratios if ratio.distance <= TOLERANCE]
    layer = next(ratio for ratio in ratios if ratio.setting.startswith("one layer of stage 3"))
    return {
        "settings": Figure(len(ratios), "settings tried"),
        "fit": Figure(len(fitting), "of these, with both factors within 5 % of 2.6 and 1.3"),
        "common": Figure("; ".join(sorted({ratio.setting for ratio in fitting})), "their setting"),
        "scoring": Figure("; ".join(sorted({ratio.design.split(" (")[0] for ratio in fitting})), "their weights"),
        "nearest": Figure(str(ratios[0]), "the closest setting"),
        "memory": Figure(ratios[0].memory, "its memory stored for the backward pass, relative to DAT", "times"),
        "macs": Figure(ratios[0].macs, "its multiply-adds relative to DAT", "times"),
        "least": Figure(
            min((ratio.memory for ratio in fitting), default=0.0), "least memory of the settings that fit", "times"
        ),
        "next": Figure(str(next(r for r in ratios if r not in fitting)), "the closest setting that does not fit"),
        "next_factor": Figure(next(r for r in ratios if r not in fitting).distance, "its deviation", "times", 2),
        "layer": Figure(str(layer), "the closest setting with one layer of stage 3"),
        "layer_memory": Figure(layer.memory, "its memory", "times"),
        "layer_macs": Figure(layer.macs, "its multiply-adds", "times"),
    }


def judge_equal_keys(figures: Figures) -> Verdict:
    """Verdict: holds in the only setting that gives both numbers; without such a setting, it cannot be tested."""
    if not figures["fit"].value or ";" in f"{figures['common']}{figures['scoring']}":
        return not_testable("the settings that were tried do not single out what the source compared")
    return holds_if(
        f"the comparison is {figures['common']} per query, {figures['scoring']}, by memory stored for the backward pass"
    )


CLAIMS = (
    Claim(
        number=16,
        title="At equal keys: 2.6 times the memory, 1.3 times the multiply-adds",
        statement="At equal keys, Deformable DETR's attention has 2.6 times the memory and 1.3 times the FLOPs of DAT.",
        sources=(Source(SUMMARY, SourceAccess.SUMMARY),),
        measure=measure_equal_keys,
        judge=judge_equal_keys,
        verdict=holds_if(
            "the comparison is the whole of dat_tiny with 196 and 49 keys per query, weights from the query, by memory "
            "stored for the backward pass"
        ),
        reason=(
            "Of {settings} settings, {fit} are within 5 % of both numbers. All of these compare the same: {common} per "
            "query, the total number of keys in the released stages 3 and 4 at 224². This setting needs {memory} times "
            "the memory ({least} if fewer coordinates are stored) and {macs} times the multiply-adds. For a single "
            "layer the ratios are larger, at best {layer_memory} and {layer_macs}. It is likely, but not known, that "
            "the source compared this setting."
        ),
    ),
)
