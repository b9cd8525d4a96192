"""Checks in addition to those of `dat_ref.testing`: against scipy, against the scalar loops, and on traces.

Each check takes an implementation, so that the tests can pass a correct one and `test_mutants` wrong ones. It raises
AssertionError on failure. The examples are fixed and have axes of different lengths; the property tests draw many more.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from oracle import sampling as loops
from scipy.ndimage import map_coordinates

from dat_ref import Convention, DeformableAttentionConfig, OffsetBound, init_params
from dat_ref.layer import deformable_shapes
from dat_ref.testing.ops.bias import gather_table

from .agreement import assert_agree
from .layers import random_params, run_oracle, transpose, transposed_config

Array = np.ndarray
Sampler = Callable[[Array, Array], Array]
Layer = Callable[[Array, Any, DeformableAttentionConfig], tuple[Array, Any]]

CONSISTENT = (Convention.CELL_CENTER, Convention.PAPER)

# ------------------------------------------------------------------------------------------------ samplers


def example_map() -> tuple[Array, Array]:
    """Return maps (2, 3, 5, 4) and points (2, 12, 2): on pixels, between them, on the border, just and far outside."""
    rng = np.random.default_rng(5)
    corners = [[0, 0], [4, 3], [2, 1], [-0.5, 1.25], [4.75, 2.5], [1.5, 3.25], [-1, 0], [9, -7]]
    inside = rng.uniform([0, 0], [4, 3], (4, 2))
    points = np.concatenate([np.array(corners, dtype=np.float64), inside])
    return rng.standard_normal((2, 3, 5, 4)), np.stack([points, points[::-1]])


def sampling_matches_map_coordinates(sample: Sampler, x: Array | None = None, points_px: Array | None = None) -> None:
    """Check that sampling is scipy's linear interpolation with zeros outside."""
    if x is None or points_px is None:
        x, points_px = example_map()
    sampled = sample(x, points_px)
    for n, c in np.ndindex(*x.shape[:2]):
        options: dict[str, Any] = {"order": 1, "prefilter": False, "mode": "grid-constant", "cval": 0.0}
        assert_agree(sampled[n, c], map_coordinates(x[n, c], points_px[n].T, **options), 1e-12, "sampled")


def sampling_matches_loops(sample: Sampler, x: Array | None = None, points_px: Array | None = None) -> None:
    """Check that sampling is the sum over all pixels of hat times hat times pixel."""
    if x is None or points_px is None:
        x, points_px = example_map()
    sampled = sample(x, points_px)
    for n, p in np.ndindex(*points_px.shape[:2]):
        expected = loops.bilinear_channels(x, n, range(x.shape[1]), *points_px[n, p].tolist())
        assert_agree(sampled[n, :, p], expected, 1e-12, "sampled")


# ------------------------------------------------------------------------------------------------ layers


def example_config(convention: Convention, **changes: Any) -> DeformableAttentionConfig:
    """Return a layer with two groups of two heads, for a map of 5 x 3."""
    base = DeformableAttentionConfig(
        dim=8, heads=4, groups=2, kernel_size=3, offset_range=3.0, size=(5, 3), convention=convention
    )
    return replace(base, **changes)


def example_input(config: DeformableAttentionConfig) -> tuple[Array, Any]:
    """Return a map (2, 8, 5, 3) and random parameters."""
    rng = np.random.default_rng(8)
    return rng.standard_normal((2, config.dim, 5, 3)), random_params(deformable_shapes(config), rng)


def layer_matches_loops(layer: Layer) -> None:
    """Check the layer against the scalar loops: points, samples, bias, attention and output, in every convention."""
    for convention in Convention:
        config = example_config(convention)
        x, params = example_input(config)
        layer_matches_oracle(layer, x, params, config)


def layer_matches_oracle(layer: Layer, x: Array, params: Any, config: DeformableAttentionConfig) -> None:
    """Check the layer against the scalar loops on one input."""
    y, trace = layer(x, params, config)
    expected = run_oracle(x, params, config)
    # An infinite reference (2023, one key) may map to any pixel; its point is on the map again.
    finite = np.isfinite(expected.reference)
    assert_agree(trace.reference[finite], expected.reference[finite], 1e-12, "reference")
    if not config.average_pool:
        assert_agree(trace.points_px, expected.points_px, 1e-11, "points_px")
    assert_agree(trace.points, expected.points, 1e-12, "points")
    assert_agree(trace.sampled, expected.sampled, 1e-11, "sampled")
    if trace.bias is not None:
        assert_agree(np.broadcast_to(trace.bias, expected.bias.shape), expected.bias, 1e-11, "bias")
    assert_agree(trace.attention, expected.attention, 1e-11, "attention")
    assert_agree(y, expected.output, 1e-11, "output")


def zero_offset_is_the_identity(layer: Layer) -> None:
    """Check that the consistent conventions sample the map itself at stride 1 and zero offset."""
    for convention in CONSISTENT:
        config = example_config(convention)
        x, _ = example_input(config)
        params = init_params(config, 3, offsets="zero_offset", dtype=np.float64)
        _, trace = layer(x, params, config)
        assert_agree(trace.sampled, x, 1e-12, f"{convention}: sampled")


def zero_offset_bias_is_a_gather(layer: Layer) -> None:
    """Check that the consistent conventions read the table's own entries at stride 1 and zero offset, as Swin does."""
    for convention in CONSISTENT:
        config = example_config(convention, offset_bound=OffsetBound.NONE)
        x, params = example_input(config)
        _, trace = layer(x, params, config)
        expected = gather_table(params["position_bias"]["table"], (5, 3))
        assert_agree(trace.bias, np.broadcast_to(expected, trace.bias.shape), 1e-12, f"{convention}: bias")


def layer_commutes_with_transposition(layer: Layer) -> None:
    """Check that exchanging y and x everywhere exchanges them in the output."""
    for convention in Convention:
        config = example_config(convention)
        x, params = example_input(config)
        transposed, _ = layer(x.swapaxes(2, 3), transpose(params, config, (5, 3), (5, 3)), transposed_config(config))
        assert_agree(transposed.swapaxes(2, 3), layer(x, params, config)[0], 1e-11, f"{convention}")


def groups_are_independent(layer: Layer) -> None:
    """Check that other queries in group 1 change group 1's points, samples and bias, and not group 0's."""
    config = example_config(Convention.CELL_CENTER)
    x, params = example_input(config)
    _, before = layer(x, params, config)
    changed = {**params, "query": {name: np.array(leaf) for name, leaf in params["query"].items()}}
    changed["query"]["weight"][config.group_dim :] *= -1.5
    _, after = layer(x, changed, config)
    half, heads = config.dim // 2, config.heads // 2
    for name, first, second in (
        ("points", np.s_[:, :1], np.s_[:, 1:]),
        ("sampled", np.s_[:, :half], np.s_[:, half:]),
        ("bias", np.s_[:, :heads], np.s_[:, heads:]),
    ):
        old, new = getattr(before, name), getattr(after, name)
        assert_agree(new[first], old[first], 1e-13, f"{name} of group 0")
        assert np.abs(new[second] - old[second]).max() > 1e-3, f"{name} of group 1 did not move"


def attention_follows_bias(layer: Layer) -> None:
    """Check that a query attends most to the keys above and left of it if the table rises with the displacement q - p.

    All other logits are equal; the table varies on one axis at a time.
    """
    config = example_config(Convention.CELL_CENTER, offset_bound=OffsetBound.NONE)
    x, params = example_input(config)
    zero_projections = {
        name: {key: np.zeros_like(leaf) for key, leaf in params[name].items()} for name in ("query", "key")
    }
    for axis in range(2):
        ramp = np.arange(9.0)[:, None] + np.zeros(5) if axis == 0 else np.zeros((9, 1)) + np.arange(5.0)
        table = np.broadcast_to(ramp, (4, 9, 5))
        _, trace = layer(x, {**params, **zero_projections, "position_bias": {"table": table}}, config)
        attention = trace.attention.reshape(2, 4, 5, 3, 5, 3).sum(axis=(5, 4)[axis])
        assert (np.diff(attention, axis=-1) < 0).all(), f"axis {axis}: attention must fall with the key's coordinate"


LAYER_CHECKS = (
    layer_matches_loops,
    zero_offset_is_the_identity,
    zero_offset_bias_is_a_gather,
    layer_commutes_with_transposition,
    groups_are_independent,
    attention_follows_bias,
)
SAMPLER_CHECKS = (sampling_matches_map_coordinates, sampling_matches_loops)
