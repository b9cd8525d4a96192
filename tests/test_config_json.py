"""Backbone configurations as JSON: exact round trips, and wrong values are refused with the name of the field."""

import contextlib
import copy
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dat_ref
from dat_ref import ConfigError, Convention
from dat_ref.config_json import from_json, from_mapping, to_mapping
from dat_ref.peers.matching import CONTROLS, REPLACEMENTS, replace_attention
from dat_ref.presets import PRESETS


def through_json(config):
    return from_mapping(from_json(json.dumps(to_mapping(config))))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name):
    config = dat_ref.config(name, num_classes=7, in_channels=2)
    assert through_json(config) == config


@pytest.mark.parametrize("kind", [*REPLACEMENTS, *CONTROLS])
def test_peers_survive_the_round_trip(kind):
    config = replace_attention(dat_ref.config("dat_nano"), kind, "keys")
    assert through_json(config) == config


@given(convention=st.sampled_from(list(Convention)), size=st.tuples(st.integers(32, 300), st.integers(32, 300)))
def test_conventions_and_sizes_survive_the_round_trip(convention, size):
    def changed(block):
        if not isinstance(block.attention, dat_ref.DeformableAttentionConfig):
            return block
        return replace(block, attention=replace(block.attention, convention=convention), layer_scale=0.1)

    preset = dat_ref.config("dat_pp_tiny")
    config = replace(preset, stages=tuple(tuple(map(changed, blocks)) for blocks in preset.stages)).resized(size)
    assert through_json(config) == config


def places(values, path=()):
    """Yield the path of every value inside a nested value."""
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield (*path, key)
        yield from places(values[key], (*path, key))


SPOT = to_mapping(dat_ref.config("dat_spot"))


@given(
    place=st.sampled_from(list(places(SPOT))),
    value=st.sampled_from([None, "", "x", -1, 0, 1.5, math.nan, [], {}, [[]], {"type": "x"}, True, 10**30, [1, "a"]]),
)
def test_any_other_value_is_accepted_as_by_the_configuration_or_refused(place, value):
    """No other exception than `ConfigError`, and an accepted value is in the configuration."""
    values = copy.deepcopy(SPOT)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with contextlib.suppress(ConfigError):
        assert through_json(config := from_mapping(values)) == config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values.pop("stages"), "config: expected the fields of DATConfig, got missing stages"),
        (lambda values: values.update(colour=1), "config: expected the fields of DATConfig, got unknown colour"),
        (lambda values: values.update(num_classes=-1), r"config\.num_classes: expected an integer >= 0, got -1"),
        (
            lambda values: values["stages"][0][1]["attention"].update(heads=5),
            r"config\.stages\[0\]\[1\]\.attention\.heads: expected a divisor of dim=32, got 5",
        ),
        (
            lambda values: values["stages"][0][1]["attention"].update(type="os.system"),
            r"config\.stages\[0\]\[1\]\.attention: expected an object with a type among Deformable",
        ),
        (lambda values: values["stages"][0][0].pop("attention"), r"stages\[0\]\[0\]: .* got missing attention"),
        (lambda values: values.update(stages={}), r"config\.stages: expected a list of blocks for each stage, got {}"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(edit, message):
    values = copy.deepcopy(SPOT)
    edit(values)
    with pytest.raises(ConfigError, match=message):
        from_mapping(values)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(ConfigError, match=r"config\.json: expected JSON, got"):
        from_json(text, "config.json")


@pytest.mark.parametrize("values", [None, 1, "x", [1]])
def test_values_that_are_no_object_are_refused(values):
    with pytest.raises(ConfigError, match="config: expected an object with the fields of DATConfig, got"):
        from_mapping(values)
