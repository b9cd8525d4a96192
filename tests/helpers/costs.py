"""Cases of every attention for the tests of cost, with their counted operations and stored bytes."""

from hypothesis import strategies as st
from strategies import Case, layer_cases, map_sizes, neighborhood_cases, seeds, window_cases

from dat_ref.block import ATTENTIONS
from dat_ref.complexity import count as count_run
from dat_ref.complexity import retained_bytes
from dat_ref.peers import (
    DATDCNAttentionConfig,
    DeformableConvConfig,
    MultiHeadAttentionConfig,
    MultiScaleDeformableConfig,
    PerQueryAttentionConfig,
    PyramidAttentionConfig,
)

PEERS = [
    MultiHeadAttentionConfig(6, 2),
    MultiHeadAttentionConfig(6, 3, size=(5, 3)),
    PyramidAttentionConfig(6, 2, reduction=1),
    PyramidAttentionConfig(6, 2, reduction=2),
    DeformableConvConfig(6, 3, groups=2, offset_groups=3),
    DeformableConvConfig(6, 5, modulated=False),
    MultiScaleDeformableConfig(6, 2, points=3),
    MultiScaleDeformableConfig(6, 3, points=2, scoring="dot_product"),
    PerQueryAttentionConfig(6, 2, groups=2, kernel_size=3, offset_kernel_size=5),
    PerQueryAttentionConfig(6, 3, kernel_size=1, offset_kernel_size=3),
    DATDCNAttentionConfig(6, 2, points=3),
]


@st.composite
def peer_cases(draw: st.DrawFn) -> Case:
    """Draw a peer on a map with H != W."""
    config = draw(st.sampled_from(PEERS))
    smallest = 2 if isinstance(config, DATDCNAttentionConfig) else 1
    return Case(config, draw(map_sizes(smallest)), draw(st.sampled_from([1, 2])), draw(seeds))


any_case = st.one_of(layer_cases(), window_cases(), neighborhood_cases(), peer_cases())


def forward(case):
    return ATTENTIONS[type(case.config)].forward


def count_case(case):
    return count_run(forward(case), case.x(), case.params(), case.config)


def saved_bytes(case, dtype):
    x, parameters = case.x(dtype), case.params(dtype)
    y, trace = forward(case)(x, parameters, case.config)
    return retained_bytes([y, trace], exclude=[x, parameters])


# Parameters and multiply-adds of matrix products and convolutions, at the size of the article's table.
EXACT = {
    "dat_tiny": (28_319_138, 4_563_459_840),
    "dat_small": (49_700_402, 8_958_726_912),
    "dat_base": (87_881_632, 15_721_415_680),
    "dat_base_384": (88_178_272, 49_449_656_320),
    "dat_pp_tiny": (23_962_876, 4_258_983_616),
    "dat_pp_small": (53_127_366, 9_382_477_344),
    "dat_pp_base": (93_690_640, 16_501_972_352),
    "dat_pp_base_384": (93_690_640, 49_502_205_952),
}
