"""Suggested hyperparameters of a deformable-attention layer, from the size of its map and a number of keys.

Every choice has a reason that this package computes: coverage and capture radius (`dat_ref.ops.coverage`),
multiply-adds and parameters (`dat_ref.complexity`), or the released configurations (`dat_ref.presets`). The reasons
hold for the map that the layer samples: convolutions and windows before it carry what lies between the points to them.
"""

from __future__ import annotations

import math
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

from ._checks import ConfigError, check_divides, integer, optional, size_pair
from .complexity import attention_terms, total
from .config import BiasKind, DeformableAttentionConfig, Init, OffsetBound, default_kernel_size
from .conventions import Convention
from .ops.coverage import capture_radius, coverage, hit_rate, share_of_cell
from .ops.grid import Size, key_grid_size
from .peers.mhsa import MultiHeadAttentionConfig

HEAD_DIM = 32  # channels of a head in every released model
GROUP_DIM = 64  # fewest channels of an offset group in the released models
OFFSET_RANGE = 2.0  # s
BIAS_SHARE = 0.5  # largest share of the parameters that a bias table should have


@dataclass(frozen=True)
class Choice:
    """Suggested value of a hyperparameter, and its reason."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """Result of `suggest_attention`. ``str(suggestion)`` lists the choices with their reasons.

    Args:
        config: configuration of the layer.
        init: initialization of the offsets, an argument of `dat_ref.torch.DeformableAttention`.
        size: (H, W) of the map.
        choices: all choices, with reasons.
    """

    config: DeformableAttentionConfig
    init: Init
    size: Size
    choices: tuple[Choice, ...]

    @property
    def code(self) -> str:
        """Call of `dat_ref.torch.DeformableAttention` that builds the layer."""
        options = {each.name: getattr(self.config, each.name) for each in fields(self.config)}
        for name in [each for each in options if each not in ("dim", "heads")]:
            shorter = {key: value for key, value in options.items() if key != name}
            with suppress(ConfigError):  # a bias table without its size
                if DeformableAttentionConfig(**shorter) == self.config:
                    options = shorter
        shown = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}
        if self.init != "released":
            shown["init"] = self.init
        arguments = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"DeformableAttention({arguments})"

    def to_dict(self) -> dict[str, Any]:
        """Return the choices and the call as a JSON object."""
        choices = [
            {**asdict(each), "value": each.value.value if isinstance(each.value, Enum) else each.value}
            for each in self.choices
        ]
        return {"choices": choices, "code": self.code}

    def __str__(self) -> str:
        shown = [(each.name, _text(each.value), each.reason) for each in self.choices]
        widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
        indent = " " * (sum(widths) + 4)
        rows = [
            textwrap.fill(f"{name:{widths[0]}}  {value:{widths[1]}}  {reason}", 110, subsequent_indent=indent)
            for name, value, reason in shown
        ]
        return "\n".join([*rows, "", self.code])


def suggest_attention(
    dim: int, size: Size, max_keys: int, *, heads: int | None = None, target: int | None = None
) -> Suggestion:
    """Suggest the hyperparameters of a deformable-attention layer.

    Args:
        dim: number of channels C.
        size: (H, W) of the map that the layer gets.
        max_keys: budget of keys, at least 1. The cost of the attention is proportional to it.
        heads: number of heads, a divisor of `dim`. By default heads have about 32 channels.
        target: side of the smallest object that matters, in pixels of the map, if it is known.

    Raises:
        ConfigError: if a value is invalid, or the target is larger than the map.

    >>> found = suggest_attention(64, (56, 56), max_keys=200)
    >>> found.config.stride, found.config.size, found.init
    (4, (14, 14), 'zero_offset')
    >>> print(found.code)
    DeformableAttention(dim=64, heads=2, stride=4, size=(14, 14), init='zero_offset')
    """
    dim, size, max_keys = integer(1)("dim", dim), size_pair("size", size), integer(1)("max_keys", max_keys)
    target = optional(integer(1))("target", target)
    if target is not None and target > min(size):
        raise ConfigError(f"target: expected at most the map, {size[0]} × {size[1]}, got {target}")
    heads = _heads(dim) if heads is None else integer(1)("heads", heads)
    check_divides("heads", heads, "dim", dim)
    stride = _stride(size, max_keys)
    config = DeformableAttentionConfig(
        dim, heads, _groups(dim, heads), stride, offset_range=OFFSET_RANGE, bias=BiasKind.NONE
    )
    if coverage(size, stride) == 1:
        config = replace(config, groups=1, offset_bound=OffsetBound.NONE)
    config = _with_bias(config, size)
    # With offsets the stride is 3 or more, and s/2 · stride exceeds one pixel.
    init: Init = "released" if config.offset_bound is OffsetBound.NONE else "zero_offset"
    choices = (
        Choice("heads", heads, f"{config.head_dim} channels in a head; the released models have {HEAD_DIM}"),
        Choice("stride", stride, _stride_reason(config, size, max_keys, target)),
        *_offset_choices(config, size, target or 1),
        Choice("bias", config.bias, _bias_reason(config, size)),
        Choice("cost", _short(_macs(size, config)), _cost_reason(config, size)),
    )
    return Suggestion(config, init, size, choices)


# ------------------------------------------------------------------------------------------------ choices


def _heads(dim: int) -> int:
    """Return the divisor of `dim` whose heads are closest to 32 channels."""
    return min(_divisors(dim), key=lambda heads: abs(math.log(dim / heads / HEAD_DIM)))


def _groups(dim: int, heads: int) -> int:
    """Return the largest number of groups of at least 64 channels."""
    return max(groups for groups in _divisors(heads) if groups == 1 or dim // groups >= GROUP_DIM)


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def _stride(size: Size, max_keys: int) -> int:
    """Return the smallest stride with at most `max_keys` keys, or the next one if its fewer keys read more."""
    smallest = next(stride for stride in range(1, max(size) + 1) if _keys(size, stride) <= max_keys)
    return max(smallest, smallest + 1, key=lambda stride: coverage(size, stride))  # the first of equal ones


def _key_size(size: Size, stride: int) -> Size:
    return key_grid_size(size, default_kernel_size(stride), stride, Convention.CELL_CENTER)


def _keys(size: Size, stride: int) -> int:
    return math.prod(_key_size(size, stride))


def _with_bias(config: DeformableAttentionConfig, size: Size) -> DeformableAttentionConfig:
    """Return the configuration with a bias table of the map or of the key grid, or with a depthwise bias."""
    for table in (size, _key_size(size, config.stride)):
        found = replace(config, bias=BiasKind.TABLE, size=table)
        if _bias_share(found, size) <= BIAS_SHARE:
            return found
    return replace(config, bias=BiasKind.DEPTHWISE)


def _bias_share(config: DeformableAttentionConfig, size: Size) -> float:
    terms = attention_terms(1, size, config)
    return terms["bias"].parameters / total(terms).parameters


def _macs(size: Size, config: Any) -> int:
    return total(attention_terms(1, size, config)).macs


# ------------------------------------------------------------------------------------------------ reasons


def _stride_reason(config: DeformableAttentionConfig, size: Size, max_keys: int, target: int | None) -> str:
    stride, (rows, columns) = config.stride, _key_size(size, config.stride)
    read = coverage(size, stride)
    reason = f"{rows} × {columns} = {rows * columns} keys; without offsets they read {read:.0%} of the map"
    if target is not None:
        hits = hit_rate(size, stride, (target, target))
        reason += f", and a target of {target} × {target} at {hits:.0%} of its positions"
    before = stride - 1
    if before and _keys(size, before) <= max_keys and coverage(size, before) < read:
        reason += f" ({_keys(size, before)} keys of stride {before} would read {coverage(size, before):.0%})"
    return reason


def _offset_choices(config: DeformableAttentionConfig, size: Size, target: int) -> tuple[Choice, ...]:
    """Return the choices for the offsets: only their absence if the key grid reads the whole map."""
    if config.offset_bound is OffsetBound.NONE:
        reason = "the keys read the whole map, so offsets cannot recover a missed pixel; at stride 3 or more they can"
        return (Choice("offset_bound", config.offset_bound, reason),)
    stride, limit = config.stride, config.max_offset_px
    assert limit is not None
    share = attention_terms(1, size, config)["offset network"].macs / _macs(size, config)
    seen = f" (kernel 5: {share_of_cell(5, stride):.0%} of it)" if stride > 5 else ""
    at_border = 1 - (1 / config.offset_range) ** 2  # derivative of tanh where it moves a point to its cell's border
    reasons = {
        "kernel_size": f"it sees the whole cell of {stride} × {stride}{seen}; {share:.1%} of the multiply-adds",
        "offset_range": f"s: a point moves {limit:g} pixels at most on each axis; at the border of its cell it has "
        f"{at_border:.0%} of its gradient, with s = 1 none",
        "groups": f"{config.group_dim} channels in a group, with points of its own at the same multiply-adds; the "
        "released models have 64 to 128",
    }
    start = (
        f"a random initialization moves points by up to {limit:g} pixels; a target of {target} × {target} attracts a "
        f"point from {capture_radius(target):g}"
    )
    choices = [Choice(name, getattr(config, name), reason) for name, reason in reasons.items()]
    return (*choices, Choice("init", "zero_offset", start))


def _bias_reason(config: DeformableAttentionConfig, size: Size) -> str:
    whole = replace(config, bias=BiasKind.TABLE, size=size)
    full = f"a table for {size[0]} × {size[1]} would have {_bias_share(whole, size):.0%} of the parameters"
    if config.bias is not BiasKind.TABLE:
        return f"a convolution of the queries; {full}"
    assert config.size is not None
    reason = f"for a map of {config.size[0]} × {config.size[1]}: {_bias_share(config, size):.0%} of the parameters"
    return reason if config.size == size else f"{reason}, read in fractions of the map; {full}"


def _cost_reason(config: DeformableAttentionConfig, size: Size) -> str:
    every = _macs(size, MultiHeadAttentionConfig(config.dim, config.heads))
    count = total(attention_terms(1, size, config)).parameters
    return f"multiply-adds, {count:,} parameters; {_short(every)} with all {math.prod(size):,} pixels as keys"


def _short(count: int) -> str:
    """Return a count in millions, billions (G) or trillions (T)."""
    power, unit = next(
        (power, unit) for power, unit in ((12, "T"), (9, "G"), (6, "M")) if count >= 10**power or power == 6
    )
    return f"{count / 10**power:.3g} {unit}"


def _text(value: Any) -> str:
    return f"{value.value if isinstance(value, Enum) else value}"
