"""Torch modules of the attention systems: their rows in `dat_ref.peers.registry` name them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from torch import nn

from ...config import DeformableAttentionConfig
from ...peers.attention import Attention
from ...peers.registry import ATTENTIONS


def module_class(row: Attention) -> type[nn.Module]:
    """Return the torch module of a row."""
    return _load(row.module)


@cache
def _load(path: str) -> type[nn.Module]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def module_options(row: Attention) -> frozenset[str]:
    """Return the options of a row's module, such as ``"sampler"``: the keyword-only arguments of its constructor."""
    return _options(row.module)


@cache
def _options(path: str) -> frozenset[str]:
    parameters = signature(_load(path)).parameters.values()
    return frozenset(each.name for each in parameters if each.kind is Parameter.KEYWORD_ONLY)


def attentions_with(option: str) -> tuple[Any, ...]:
    """Return the attention modules that have an option."""
    return tuple(module_class(row) for row in ATTENTIONS.values() if option in module_options(row))


PEER_MODULES: dict[type, type[nn.Module]] = {
    config: module_class(row) for config, row in ATTENTIONS.items() if config is not DeformableAttentionConfig
}
