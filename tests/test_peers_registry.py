"""Rows of the attention systems: complete, without conflicts, and read by every part of the package."""

from dataclasses import replace
from unittest import mock

import pytest

from dat_ref import ConfigError, DeformableAttentionConfig, config, init_params
from dat_ref.complexity import attention_terms, total
from dat_ref.config import PeerConfig
from dat_ref.params import flatten
from dat_ref.peers import ATTENTIONS, REPLACEMENTS, DeformableConvConfig, matched_peer, register
from dat_ref.peers.registry import row_of

LAYER = DeformableAttentionConfig(12, 6, 3, 2, size=(5, 7))
PEERS = {kind: matched_peer(LAYER, (5, 7), kind) for kind in REPLACEMENTS}
ROWS = {row.config.__name__: row for row in ATTENTIONS.values()}


class Another(PeerConfig):
    """Configuration type without a row."""


@pytest.fixture
def registry():
    """Restore the registry at the end of the test."""
    with mock.patch.dict(ATTENTIONS), mock.patch.dict(REPLACEMENTS):
        yield


def test_a_registered_row_is_found_by_its_configuration_and_its_kind(registry):
    row = replace(ATTENTIONS[DeformableConvConfig], config=Another, replacements={"another": list})
    register(row)
    assert row_of(Another(4)) is row
    assert REPLACEMENTS["another"] is list


def test_a_second_row_for_a_type_or_a_kind_is_refused(registry):
    row = ATTENTIONS[DeformableConvConfig]
    with pytest.raises(ConfigError, match="config: expected a type without a row, got DeformableConvConfig"):
        register(row)
    with pytest.raises(ConfigError, match="replacements: expected new kinds, got 'deform_conv', which is registered"):
        register(replace(row, config=Another))
    assert Another not in ATTENTIONS


def test_a_configuration_without_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"config: expected one of DeformableAttentionConfig, .*, got Another"):
        row_of(Another(4))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_term_of_the_row_has_its_parameters(row):
    """`parameter_terms` has no entry for a parameter that the system does not have."""
    configs = [LAYER, *PEERS.values()]
    configs += [DeformableAttentionConfig(12, 6, 3, 2), replace(PEERS["multi_head"], size=(5, 7))]
    parts = {name.split(".")[0] for each in configs if type(each) is row.config for name in flatten(row.shapes(each))}
    assert set(row.parameter_terms) <= parts
    assert set(row.packed_layers) <= parts


@pytest.mark.parametrize("kind", PEERS)
def test_terms_are_the_multiply_adds(kind):
    peer = PEERS[kind]
    row = row_of(peer)
    assert sum(row.terms(2, (5, 7), peer).values()) == row.macs(2, (5, 7), peer)
    assert total(attention_terms(2, (5, 7), peer)).macs == row.macs(2, (5, 7), peer)


@pytest.mark.parametrize("kind", PEERS)
def test_released_names_are_those_of_the_parameters(kind):
    row = row_of(PEERS[kind])
    if row.released_names is None or kind == "ms_deform_dot":  # the variant was not released
        pytest.skip("there is no released module")
    assert set(row.released_names(PEERS[kind])) == set(flatten(row.shapes(PEERS[kind])))


@pytest.mark.parametrize("kind", PEERS)
def test_the_row_names_a_torch_module_with_its_parameters(kind):
    pytest.importorskip("torch")
    from dat_ref.torch.peers.registry import module_class, module_options

    row = row_of(PEERS[kind])
    module = module_class(row)(PEERS[kind])
    assert {name: tuple(leaf.shape) for name, leaf in module.named_parameters()} == flatten(row.shapes(PEERS[kind]))
    assert module_options(row) <= {"backend", "sampler", "init"}
    for name in row.packed_layers:
        assert type(getattr(module, name)).__name__ == "Linear"


# ------------------------------------------------------------------------------------------------ in a backbone


def test_map_attention_passes_every_layer_with_its_stage():
    backbone, seen = config("dat_tiny"), []

    def change(attention, stage):
        seen.append((stage, attention))
        return replace(attention, stride=2) if attention.kind == "deformable" else attention

    changed = backbone.map_attention(change)
    assert seen == [(stage, block.attention) for stage, blocks in enumerate(backbone.stages) for block in blocks]
    assert {block.attention.stride for block in changed.stages[2] if block.attention.kind == "deformable"} == {2}
    assert changed.stages[0] == backbone.stages[0]
    assert replace(changed, stages=backbone.stages) == backbone
    with pytest.raises(ConfigError, match="expected one dim in stage 1"):
        backbone.map_attention(lambda layer, stage: replace(layer, dim=192) if layer is seen[0][1] else layer)


def test_parameters_of_a_row_are_initialized_by_its_rule():
    params = init_params(PEERS["deform_conv"], seed=0)
    assert not any(leaf.any() for leaf in params["offset"].values())
    assert params["convolution"]["weight"].any()
