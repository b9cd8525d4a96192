"""Backbone configurations as JSON, for files that store a model with its weights.

A configuration becomes an object of its fields, with members of enumerations by name or value as the configurations
accept them. An attention layer also has the field ``type``, the name of its class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

from ._checks import ConfigError
from .config import BlockConfig, DATConfig
from .conventions import Convention
from .peers.registry import ATTENTIONS

_ATTENTION_TYPES = {kind.__name__: kind for kind in ATTENTIONS}


def to_mapping(config: DATConfig) -> dict[str, Any]:
    """Return a configuration as values of JSON.

    >>> import dat_ref
    >>> values = to_mapping(dat_ref.config("dat_spot"))
    >>> values["stages"][0][1]["attention"]["type"], values["image_size"]
    ('DeformableAttentionConfig', [160, 160])
    """
    values: dict[str, Any] = _plain(config)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Convention):
        return value.name.lower()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if is_dataclass(value):
        found = {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
        return {"type": type(value).__name__, **found} if type(value) in ATTENTIONS else found
    return value


def from_mapping(values: Any, name: str = "config") -> DATConfig:
    """Return the configuration of values that `to_mapping` returned.

    Args:
        values: mapping of the fields of a `DATConfig`. Fields with a default may be missing.
        name: name of the values for error messages.

    Raises:
        ConfigError: if a field is unknown, missing or invalid. The message names it.

    >>> import dat_ref
    >>> config = dat_ref.config("dat_pp_tiny")
    >>> from_mapping(to_mapping(config)) == config
    True
    """
    given = _fields(DATConfig, values, name)
    stages = given["stages"]
    if not isinstance(stages, list) or not all(isinstance(blocks, list) for blocks in stages):
        raise ConfigError(f"{name}.stages: expected a list of blocks for each stage, got {stages!r:.80}")
    given["stages"] = tuple(
        tuple(_block(block, f"{name}.stages[{stage}][{index}]") for index, block in enumerate(blocks))
        for stage, blocks in enumerate(stages)
    )
    return _build(DATConfig, given, name)


def from_json(text: str, name: str = "config") -> Any:
    """Return the values in a JSON text.

    Raises:
        ConfigError: if it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: expected JSON, got {error}") from error


def _block(values: Any, name: str) -> BlockConfig:
    given = _fields(BlockConfig, values, name)
    attention = given["attention"]
    kind = attention.get("type") if isinstance(attention, Mapping) else None
    if not isinstance(kind, str) or kind not in _ATTENTION_TYPES:
        known = ", ".join(_ATTENTION_TYPES)
        raise ConfigError(f"{name}.attention: expected an object with a type among {known}, got {attention!r:.80}")
    own = {key: value for key, value in attention.items() if key != "type"}
    inner = f"{name}.attention"
    given["attention"] = _build(_ATTENTION_TYPES[kind], _fields(_ATTENTION_TYPES[kind], own, inner), inner)
    return _build(BlockConfig, given, name)


def _fields(kind: Any, values: Any, name: str) -> dict[str, Any]:
    """Return the fields of a configuration after a check of their names."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: expected an object with the fields of {kind.__name__}, got {values!r:.80}")
    unknown = sorted(map(str, set(values) - {each.name for each in fields(kind)}))
    missing = [each.name for each in fields(kind) if each.default is MISSING and each.name not in values]
    if unknown or missing:
        problems = [
            f"{text} {', '.join(names)}" for text, names in (("unknown", unknown), ("missing", missing)) if names
        ]
        raise ConfigError(f"{name}: expected the fields of {kind.__name__}, got {' and '.join(problems)}")
    return dict(values)


def _build(kind: Any, values: dict[str, Any], name: str) -> Any:
    """Build a configuration, which checks its values."""
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from error
