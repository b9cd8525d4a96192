"""Figures: positions of marks, no silent clipping, all shapes can be drawn."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from dat_ref import viz  # noqa: E402
from dat_ref.viz import artists, figures, geometry, style  # noqa: E402


def make_trace(batch=1, heads=6, groups=3, size=(5, 7), keys=(3, 4), spread=0.5, seed=0):
    """Return a trace with the attributes that figures read, all sizes different."""
    rng = np.random.default_rng(seed)
    (height, width), (rows, columns) = size, keys
    y = (np.arange(rows) + 0.5) * height / rows - 0.5
    x = (np.arange(columns) + 0.5) * width / columns - 0.5
    grid = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
    reference = np.broadcast_to(grid, (batch, groups, rows, columns, 2))
    attention = rng.exponential(size=(batch, heads, height * width, rows * columns))
    return SimpleNamespace(
        x=np.zeros((batch, heads, height, width)),
        reference_px=reference,
        points_px=reference + spread * rng.standard_normal(reference.shape),
        attention=attention / attention.sum(axis=-1, keepdims=True),
    )


def make_photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn(figure, gid):
    """Return the offsets of all scatters with this gid, as (y, x) in pixels of the photograph."""
    found = [c.get_offsets() for axes in figure.axes for c in axes.collections if c.get_gid() == gid]
    return np.concatenate([np.asarray(offsets, float).reshape(-1, 2) for offsets in found])[:, ::-1]


# Geometry


def test_to_image_px_is_identity_at_equal_sizes_and_maps_borders_to_borders():
    points = np.array([[0.0, 0.0], [-0.5, 6.5], [4.5, 2.25]])
    np.testing.assert_array_equal(viz.to_image_px(points, (5, 7), (5, 7)), points)
    corners = viz.to_image_px([[-0.5, -0.5], [4.5, 6.5]], (5, 7), (40, 21))
    np.testing.assert_allclose(corners, [[-0.5, -0.5], [39.5, 20.5]])


def test_to_image_px_puts_a_cell_at_the_center_of_its_pixels():
    # cell (1, 2) of a 3 × 5 map covers rows 4..7 and columns 4..5 of a 12 × 10 photograph
    np.testing.assert_allclose(viz.to_image_px((1, 2), (3, 5), (12, 10)), (5.5, 4.5))


@pytest.mark.parametrize("bad", [((1, 2, 3), (2, 2), (2, 2)), (1.0, (2, 2), (2, 2)), ((1, 2), (0, 2), (2, 2))])
def test_to_image_px_names_what_is_wrong(bad):
    with pytest.raises(ValueError, match=r"points_px|map_size"):
        viz.to_image_px(*bad)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_key_importance_equals_a_loop_and_sums_to_the_queries(groups):
    attention = make_trace(batch=2).attention
    batch, heads, queries, keys = attention.shape
    importance = viz.key_importance(attention, groups)
    expected = np.zeros((batch, groups, keys))
    per_group = heads // groups
    for b in range(batch):
        for head in range(heads):
            for q in range(queries):
                for n in range(keys):
                    expected[b, head // per_group, n] += attention[b, head, q, n] / per_group
    np.testing.assert_allclose(importance, expected, rtol=1e-12)
    np.testing.assert_allclose(importance.sum(axis=-1), queries, rtol=1e-12)


def test_key_importance_rejects_groups_that_do_not_divide_the_heads():
    with pytest.raises(ValueError, match="groups=4"):
        viz.key_importance(np.ones((1, 6, 2, 3)), 4)


def test_attention_map_splits_weights_between_cells():
    heat = viz.attention_map([0.5, 0.25, 0.25], [(0, 3), (1.5, 2.25), (-0.5, 0)], (3, 4))
    expected = np.zeros((3, 4))
    expected[0, 3] = 0.5
    expected[1:, 2], expected[1:, 3] = 0.25 * 0.5 * 0.75, 0.25 * 0.5 * 0.25
    expected[0, 0] = 0.25 * 0.5  # the other half is read from outside
    np.testing.assert_allclose(heat, expected)


def test_attention_map_is_the_transpose_of_bilinear_sampling():
    from scipy.ndimage import map_coordinates

    rng = np.random.default_rng(1)
    cells = rng.uniform(-3, 8, (200, 2))
    weights, features = rng.standard_normal(200), rng.standard_normal((4, 6))
    sampled = map_coordinates(np.pad(features, 5), cells.T + 5, order=1)  # zeros outside
    laid = viz.attention_map(weights, cells, (4, 6))
    assert np.vdot(laid, features) == pytest.approx(np.vdot(weights, sampled), rel=1e-12)


def test_attention_map_of_points_far_outside_is_zero():
    far = [(1e30, 0), (0, -1e30), (np.inf, 1)]
    assert not viz.attention_map([1, 1, 1], far, (3, 4)).any()


def test_deformable_query_attention_takes_the_querys_row_and_sums_to_one():
    trace = make_trace(batch=2)
    attended = viz.deformable_query_attention(trace, (3, 2), batch=1)
    assert attended.weights.sum() == pytest.approx(1)
    row = trace.attention[1, :, 3 * 7 + 2]  # heads 2 and 3 are group 1
    np.testing.assert_allclose(attended.weights[12:24], (row[2] + row[3]) / 2 / 3)
    np.testing.assert_array_equal(attended.keys_px[12:24], trace.points_px[1, 1].reshape(-1, 2))
    with pytest.raises(ValueError, match="5×7 map"):
        viz.deformable_query_attention(trace, (5, 0))
    with pytest.raises(ValueError, match="batch of 2"):
        viz.deformable_query_attention(trace, (0, 0), batch=2)


@pytest.mark.parametrize("shift", [0, 1])
def test_window_query_attention_finds_the_querys_window(shift):
    from dat_ref.config import WindowAttentionConfig
    from dat_ref.peers.window import window_attention, window_shapes

    config = WindowAttentionConfig(dim=4, heads=2, window_size=3, shift=shift)
    rng = np.random.default_rng(2)
    params = {
        name: {leaf: rng.standard_normal(shape) for leaf, shape in leaves.items()}
        for name, leaves in window_shapes(config).items()
    }
    _, trace = window_attention(rng.standard_normal((2, 4, 5, 7)), params, config)
    attended = viz.window_query_attention(trace, (3, 4), batch=1)
    # windows of three start at 0 and 3, or at 1 and 4 when shifted; the map has 5 rows and 7 columns
    rows, columns = ((3, 4), (3, 4, 5)) if shift == 0 else ((1, 2, 3), (4, 5, 6))
    assert {tuple(cell) for cell in attended.keys_px} == {(y, x) for y in rows for x in columns}
    assert attended.weights.sum() <= 1 + 1e-12


@pytest.mark.parametrize(("size", "expected"), [((5, 7), 9), ((2, 7), 9)])
def test_neighborhood_query_attention_is_around_the_query(size, expected):
    from dat_ref.config import NeighborhoodAttentionConfig
    from dat_ref.peers.neighborhood import neighborhood_attention, neighborhood_shapes

    config = NeighborhoodAttentionConfig(dim=4, heads=2, kernel_size=3)
    rng = np.random.default_rng(3)
    params = {
        name: {leaf: rng.standard_normal(shape) for leaf, shape in leaves.items()}
        for name, leaves in neighborhood_shapes(config).items()
    }
    _, trace = neighborhood_attention(rng.standard_normal((2, 4, *size)), params, config)
    attended = viz.neighborhood_query_attention(trace, (1, 4), batch=1)
    assert attended.weights.sum() == pytest.approx(1)
    assert {x for _, x in attended.keys_px} == {3, 4, 5}
    assert len(attended.weights) <= expected


# Marks


def test_a_point_is_drawn_on_the_bright_patch_that_it_samples():
    """On a black photograph with one bright patch, the mark of a point on that cell is on the patch."""
    map_size, scale = (4, 6), (10, 7)
    photo = np.zeros((40, 42, 3))
    photo[30:40, 7:14] = 1  # cell (3, 1)
    trace = make_trace(groups=1, size=map_size, keys=(1, 1))
    trace.points_px = np.array([3.0, 1.0]).reshape(1, 1, 1, 1, 2)
    for figure, gid in ((viz.draw_points(photo, trace), "points"), (viz.draw_key_importance(photo, trace), "keys")):
        [(y, x)] = drawn(figure, gid)
        assert (y, x) == (3.5 * scale[0] - 0.5, 1.5 * scale[1] - 0.5)
        assert photo[round(y), round(x)].all()
        picture = figure.axes[0].images[0]
        assert picture.get_array().shape == photo.shape
        assert tuple(picture.get_extent()) == (-0.5, 41.5, 39.5, -0.5)


def test_the_patch_is_bright_under_the_mark_in_the_written_picture(tmp_path):
    """End to end: in the written file, the star of a query covers the patch and nothing else."""
    from matplotlib.image import imread

    photo = np.zeros((30, 50, 3))
    photo[20:25, 10:15] = 1  # cell (4, 2) of a 6 × 10 map
    one = viz.QueryAttention(np.ones(1), np.array([[4.0, 2.0]]))
    figure = viz.draw_attention(photo, [(4, 2)], [one], [one], map_size=(6, 10))
    picture = imread(viz.save(figure, tmp_path / "a.png"))[..., :3]
    box = figure.axes[0].get_position()
    height, width = picture.shape[:2]
    panel = picture[
        round((1 - box.y1) * height) : round((1 - box.y0) * height), round(box.x0 * width) : round(box.x1 * width)
    ]
    red = (panel[..., 0] > 0.8) & (panel[..., 1] < 0.4)
    y, x = np.argwhere(red).mean(axis=0) / panel.shape[:2]
    assert y == pytest.approx(4.5 / 6, abs=0.02)
    assert x == pytest.approx(2.5 / 10, abs=0.02)


def test_arrows_start_at_references_and_end_at_points():
    from matplotlib.quiver import Quiver

    trace = make_trace(groups=2, spread=0.2)
    figure = viz.draw_points(make_photo(50, 63), trace)
    arrows = [c for c in figure.axes[0].collections if isinstance(c, Quiver)][1]
    tails = viz.to_image_px(trace.reference_px[0, 0], (5, 7), (50, 63)).reshape(-1, 2)
    tips = viz.to_image_px(trace.points_px[0, 0], (5, 7), (50, 63)).reshape(-1, 2)
    np.testing.assert_allclose(arrows.XY, tails[:, ::-1])
    np.testing.assert_allclose(arrows.XY + np.stack([arrows.U, arrows.V], axis=-1), tips[:, ::-1])
    assert (arrows.angles, arrows.scale_units, arrows.scale) == ("xy", "xy", 1)
    np.testing.assert_allclose(drawn(figure, "points")[:12], tips)


def test_batch_index_chooses_the_item():
    trace = make_trace(batch=3, spread=0.1)
    for batch in (0, 2):
        expected = viz.to_image_px(trace.points_px[batch], (5, 7), (50, 63)).reshape(-1, 2)
        np.testing.assert_allclose(drawn(viz.draw_points(make_photo(50, 63), trace, batch=batch), "points"), expected)


@pytest.mark.parametrize("spread", [1.0, 5.0, 1e6])
def test_points_outside_the_map_stay_in_view(spread):
    trace = make_trace(spread=spread, seed=4)
    photo = make_photo(50, 63)
    figure = viz.draw_points(photo, trace)
    points = np.concatenate([drawn(figure, "points"), drawn(figure, "clipped points")])
    assert len(points) == 3 * 12
    assert (points < -0.5).any()
    axes = figure.axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert ((points > (top, left)) & (points < (bottom, right))).all()
    assert right - left <= 63 * (1 + 2 * artists.WIDEST_MARGIN) + 1
    circles = drawn(viz.draw_key_importance(photo, trace), "keys")
    assert len(circles) == 3 * 12
    assert np.isfinite(circles).all()


def test_no_margin_without_need():
    figure = viz.draw_points(make_photo(50, 63), make_trace(spread=0))
    assert figure.axes[0].get_xlim() == (-0.5, 62.5)
    assert figure.axes[0].get_ylim() == (49.5, -0.5)


def test_circle_area_is_proportional_to_the_attention_received():
    trace = make_trace(groups=1)
    figure = viz.draw_key_importance(make_photo(50, 63), trace)
    [circles] = [c for c in figure.axes[0].collections if c.get_gid() == "keys"]
    importance = np.sort(viz.key_importance(trace.attention)[0, 0])[::-1]
    np.testing.assert_allclose(circles.get_sizes() / circles.get_sizes().sum(), importance / importance.sum())


def test_attention_heat_colours_the_keys_and_only_them():
    cells = np.array([(1, 4), (1, 5), (2, 4), (2, 5)], dtype=float)
    window = viz.QueryAttention(np.array([0.1, 0.2, 0.3, 0.4]), cells)
    figure = viz.draw_attention(make_photo(40, 63), [(1, 4)], [window], [window], map_size=(4, 7))
    layer = figure.axes[2].images[1].get_array()
    assert layer.shape == (4, 7, 4)
    assert {tuple(cell) for cell in np.argwhere(layer[..., 3] > 0)} == {tuple(cell) for cell in cells.astype(int)}


def test_outline_runs_around_the_keys():
    mask = np.zeros((3, 5), dtype=bool)
    mask[1, 2:4] = True
    segments = {tuple(sorted(map(tuple, segment))) for segment in artists._borders(mask).tolist()}
    assert segments == {
        ((0.5, 1.5), (0.5, 2.5)),
        ((0.5, 2.5), (0.5, 3.5)),
        ((1.5, 1.5), (1.5, 2.5)),
        ((1.5, 2.5), (1.5, 3.5)),
        ((0.5, 1.5), (1.5, 1.5)),
        ((0.5, 3.5), (1.5, 3.5)),
    }


def test_offset_field_shows_lengths_in_pixels_of_the_map():
    trace = make_trace(groups=2)
    figure = viz.draw_offset_field(make_photo(50, 63), trace, bound_px=(2.0, 3.0))
    length = np.linalg.norm(trace.points_px - trace.reference_px, axis=-1)[0]
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), length[0])
    np.testing.assert_allclose(figure.axes[2].images[0].get_array(), length[1])
    histograms = [axes for axes in figure.axes if "component" in axes.get_xlabel()]
    assert [sorted(line.get_xdata()[0] for line in axes.lines) for axes in histograms] == [[-2, 2], [-3, 3]]
    for axes in histograms:
        assert sum(patch.get_height() for patch in axes.patches) == 2 * 12


@pytest.mark.parametrize("factor", [0.013, 0.7, 1.0, 1.7, 42.0, 1e12])
def test_round_factor_is_the_largest_below(factor):
    rounded = figures._round_down(factor)
    assert rounded <= factor * (1 + 1e-9) < rounded * 2.01


# Whole figures


SHAPES = {
    "one key": {"size": (5, 7), "keys": (1, 1), "groups": 1, "heads": 2},
    "one pixel": {"size": (1, 1), "keys": (1, 1), "groups": 2, "heads": 2},
    "height 1": {"size": (1, 9), "keys": (1, 5), "groups": 3, "heads": 3},
    "width 1": {"size": (9, 1), "keys": (5, 1), "groups": 2, "heads": 4},
    "many groups": {"size": (7, 7), "keys": (7, 7), "groups": 12, "heads": 12},
    "big offsets": {"size": (28, 20), "keys": (7, 5), "groups": 1, "heads": 1, "spread": 15.0},
    "many keys": {"size": (30, 26), "keys": (30, 26), "groups": 1, "heads": 1},
    "no offsets": {"size": (6, 5), "keys": (3, 5), "groups": 2, "heads": 2, "spread": 0.0},
}


def test_scene_panels_show_points_of_each_trace():
    """Each panel has the points of its own trace, with the largest circle where attention is largest."""
    traces = [make_trace(seed=seed) for seed in range(4)]
    photo = make_photo(50, 70)
    panels = [viz.ScenePanel(photo, trace, f"panel {number}") for number, trace in enumerate(traces)]
    figure = viz.draw_scenes(panels, title="title", caption="caption", columns=2)
    shown = [axes for axes in figure.axes if axes.get_title("left")]
    assert [axes.get_title("left") for axes in shown] == [f"panel {number}" for number in range(4)]
    for axes, trace in zip(shown, traces, strict=True):
        circles = [each for each in axes.collections if each.get_gid() == "points"]
        expected = viz.to_image_px(trace.points_px[0], (5, 7), (50, 70)).reshape(3, -1, 2)
        received = viz.key_importance(trace.attention, 3)[0]
        assert len(circles) == 3
        for group, marks in enumerate(circles):
            offsets = np.asarray(marks.get_offsets())[:, ::-1]
            assert {tuple(np.round(each, 9)) for each in offsets} == {
                tuple(np.round(each, 9)) for each in expected[group]
            }
            largest = offsets[np.argmax(marks.get_sizes())]
            np.testing.assert_allclose(largest, expected[group][received[group].argmax()])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_figure_is_written_for_odd_shapes(shape, tmp_path):
    trace = make_trace(batch=2, **SHAPES[shape])
    photo = make_photo(90, 41)
    attended = [viz.deformable_query_attention(trace, (0, 0), batch=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = {
            "points": viz.draw_points(photo, trace, batch=1, label="Stage 3, block 6"),
            "importance": viz.draw_key_importance(photo, trace, batch=1, per_group=True),
            "field": viz.draw_offset_field(photo, trace, batch=1, bound_px=1.0),
            "attention": viz.draw_attention(photo, [(0, 0)], attended, attended, map_size=SHAPES[shape]["size"]),
            "scenes": viz.draw_scenes([viz.ScenePanel(photo, trace, "one")] * 4, title="four", caption="panels"),
        }
        for name, figure in made.items():
            path = viz.save(figure, tmp_path / f"{name}.png")
            assert path.read_bytes().startswith(b"\x89PNG")
            width = figure.get_size_inches()[0] * style.DPI
            assert 1000 <= width <= 1400


@pytest.mark.parametrize("photo", [np.zeros((8, 50, 3)), np.full((50, 8), 200, np.uint8), np.ones((1, 1, 3))])
def test_any_photograph_is_drawn(photo, tmp_path):
    assert viz.save(viz.draw_points(photo, make_trace()), tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("shape", [(5, 5, 4), (5,), (0, 5, 3)])
def test_not_a_photograph(shape):
    with pytest.raises(ValueError, match="photo: expected"):
        viz.draw_points(np.zeros(shape), make_trace())


def test_an_infinite_reference_is_drawn_at_its_point():
    """For a single key the 2023 release has no finite reference: no warning, no arrow, zero offset."""
    trace = make_trace(groups=2, keys=(1, 1), spread=0.3)
    trace.reference_px = np.full_like(trace.points_px, np.inf)
    photo = make_photo(50, 63)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = viz.draw_points(photo, trace)
        field = viz.draw_offset_field(photo, trace)
    np.testing.assert_allclose(drawn(figure, "references")[::2], drawn(figure, "points"))
    np.testing.assert_array_equal(field.axes[1].images[0].get_array(), 0)
    np.testing.assert_array_equal(geometry.item_references(trace, 0), trace.points_px[0])


def test_groups_share_a_panel_only_while_they_can_be_read():
    few, many = make_trace(keys=(3, 4)), make_trace(size=(14, 14), keys=(14, 14))
    assert len(viz.draw_points(make_photo(20, 20), few).axes) == 1
    assert len(viz.draw_points(make_photo(20, 20), many).axes) == 3


def test_queries_and_maps_must_match():
    one = viz.QueryAttention(np.ones(1), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="got 2, 1 and 1"):
        viz.draw_attention(make_photo(5, 5), [(0, 0), (1, 1)], [one], [one], map_size=(4, 4))


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_figure_is_the_same_file(suffix, tmp_path):
    paths = [viz.save(viz.draw_points(make_photo(20, 30), make_trace()), tmp_path / f"{i}.{suffix}") for i in (0, 1)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"matplotlib" not in paths[0].read_bytes()[:400].lower() or suffix == "svg"


def test_user_settings_of_matplotlib_are_ignored_and_unchanged(tmp_path):
    plain = viz.save(viz.draw_points(make_photo(20, 30), make_trace()), tmp_path / "a.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 40, "savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        odd = viz.save(viz.draw_points(make_photo(20, 30), make_trace()), tmp_path / "b.png")
        assert dict(matplotlib.rcParams) == before
    assert plain.read_bytes() == odd.read_bytes()


def test_pyplot_is_never_imported():
    code = (
        "import sys, numpy as np; from types import SimpleNamespace as N; from dat_ref import viz;"
        "p = np.zeros((1, 1, 2, 2, 2)); t = N(x=np.zeros((1, 1, 3, 3)), reference_px=p, points_px=p);"
        "viz.draw_points(np.zeros((4, 5, 3)), t); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
