"""Registry of attention systems: one row for the deformable layer and one for each of its peers.

A new system needs a file with its row, and its name in the list below; `register` adds a row from another package.
"""

from __future__ import annotations

from .._checks import ConfigError
from . import (
    dat_dcn,
    deform_conv,
    deformable,
    mhsa,
    ms_deform_layer,
    neighborhood,
    per_query,
    pyramid,
    window,
)
from .attention import Attention, Rule

ATTENTIONS: dict[type, Attention] = {}  # by configuration type
REPLACEMENTS: dict[str, Rule] = {}  # rules to replace a deformable layer, by kind


def register(attention: Attention) -> None:
    """Add a row: blocks, cost, replacement, receptive field and the torch modules know the system from then on.

    Raises:
        ConfigError: if its configuration type or one of its kinds has a row already.
    """
    if attention.config in ATTENTIONS:
        raise ConfigError(f"config: expected a type without a row, got {attention.config.__name__}")
    for kind in attention.replacements:
        if kind in REPLACEMENTS:
            raise ConfigError(f"replacements: expected new kinds, got {kind!r}, which is registered already")
    ATTENTIONS[attention.config] = attention
    REPLACEMENTS.update(attention.replacements)


def row_of(config: object) -> Attention:
    """Return the row of a configuration.

    Raises:
        ConfigError: if its type has none.
    """
    if type(config) not in ATTENTIONS:
        known = ", ".join(known.__name__ for known in ATTENTIONS)
        raise ConfigError(f"config: expected one of {known}, got {type(config).__name__}")
    return ATTENTIONS[type(config)]


for _system in (
    deformable, mhsa, window, neighborhood, pyramid, deform_conv, ms_deform_layer, per_query, dat_dcn,
):  # fmt: skip
    register(_system.ATTENTION)
