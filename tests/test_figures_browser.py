"""Live figures in a headless browser: dragging and arrow keys give the values of the spec."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from helpers.browser import tab
from helpers.figures import DOCS, load, standalone_pages

from dat_ref import Convention, NeighborhoodAttentionConfig, OffsetBound, WindowAttentionConfig
from dat_ref import DeformableAttentionConfig as Deformable
from dat_ref.complexity import attention_terms, compared_systems, total
from dat_ref.ops.bias import table_bias
from dat_ref.ops.grid import from_pixels, pixels_per_unit, reference_points, to_pixels
from dat_ref.ops.offsets import bound_offsets, bound_offsets_vjp, offset_limit
from dat_ref.ops.sampling import bilinear_sample, bilinear_sample_vjp
from dat_ref.peers import MultiHeadAttentionConfig, PyramidAttentionConfig, receptive_field

FIGURES = ("sampling", "offsets", "bias", "cost", "receptive_field")
CELLS = Convention.CELL_CENTER


@pytest.fixture(scope="module")
def browser(chromium):
    return chromium


@contextmanager
def figure(browser, name, folder=None, **options):
    """Open a figure alone; at the end, fail if its page had errors."""
    with tab(browser, **options) as opened:
        opened.open((folder or standalone_pages()) / f"{name}.html")
        yield opened
        assert opened.errors == []


def assert_close(found, expected):
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ sampling


def check_sampling(state):
    picture = np.array(state["map"], dtype=float).reshape(1, 1, *state["size"])
    point = np.array([[state["point"]]], dtype=float)
    gradients = bilinear_sample_vjp(np.ones((1, 1, 1)), picture, point)
    assert_close(state["value"], bilinear_sample(picture, point)[0, 0, 0])
    assert_close(state["slope"], gradients.points_px[0, 0])
    assert_close(sorted(weight for weight in state["weights"] if weight), sorted(gradients.x[gradients.x != 0]))


def test_sampling_by_mouse_and_keys(browser):
    with figure(browser, "sampling") as opened:
        start = opened.state()
        check_sampling(start)
        handle = opened.handle("Sampling point")
        opened.drag(handle, 83, -47)
        dragged = opened.state()
        check_sampling(dragged)
        assert dragged["point"][0] < start["point"][0]
        assert dragged["point"][1] > start["point"][1]
        opened.press("ArrowRight", "ArrowRight", "Shift+ArrowUp")
        expected = np.array(dragged["point"]) + [-0.01, 0.2]
        assert_close(opened.state()["point"], expected.round(2))
        check_sampling(opened.state())


def test_sampling_on_the_lattice_and_outside(browser):
    """The slope on a pixel is right-handed, the map is zero outside the border, and a click moves the point."""
    with figure(browser, "sampling") as opened:
        opened.handle("Sampling point").focus()
        opened.press(*["Shift+ArrowRight"] * 30, *["Shift+ArrowDown"] * 65)
        assert opened.state()["point"] == [2, 2]
        check_sampling(opened.state())
        assert "The gradient is the latter." in opened.page.locator(".live-note").inner_text()
        opened.press(*["ArrowUp"] * 60)
        assert opened.state()["point"] == [-1.25, 2]
        assert opened.state()["slope"] == [0, 0]
        check_sampling(opened.state())
        cell = opened.page.locator(".live-cell").nth(7).bounding_box()
        opened.page.mouse.click(cell["x"] + cell["width"] * 0.7, cell["y"] + cell["height"] * 0.2)
        check_sampling(opened.state())
        assert np.abs(np.array(opened.state()["point"]) - [0.7, 2.2]).max() < 0.03


def test_sampling_by_finger(browser):
    options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with figure(browser, "sampling", **options) as opened:
        start = opened.state()["point"]
        opened.touch(opened.handle("Sampling point"), 40, 60)
        check_sampling(opened.state())
        assert (np.array(opened.state()["point"]) - start > 0.5).all()
        assert opened.page.evaluate("scrollY") == 0


# ------------------------------------------------------------------------------------------------ offsets


def check_offsets(state, picture):
    size, keys = state["size"], state["keys"]
    convention, bound = Convention[state["convention"]], OffsetBound[state["bound"]]
    raw = np.array(state["raw"], dtype=float).reshape(1, 1, *keys, 2)
    reference = reference_points(keys, convention)
    options = {"offset_range": state["s"], "convention": convention}
    _, points = bound_offsets(raw, reference, bound, **options)
    points_px = to_pixels(points, size, convention).reshape(1, -1, 2)
    assert_close(state["points"], points_px[0])
    assert_close(state["colors"], bilinear_sample(picture, points_px)[0].T)
    assert_close(state["slopes"], bound_offsets_vjp(np.ones_like(raw), raw, reference, bound, **options).reshape(-1, 2))
    limit = offset_limit(state["s"], keys, convention) * pixels_per_unit(size, convention)
    assert_close(state["limit"], limit)


@pytest.fixture(scope="module")
def picture():
    image = pytest.importorskip("PIL.Image")
    with image.open(DOCS / "images" / "live_map.png") as small:
        return np.asarray(small.convert("RGB"), dtype=float).transpose(2, 0, 1)[None]


def test_offsets_by_mouse_and_keys(browser, picture):
    with figure(browser, "offsets") as opened:
        start = opened.state()
        check_offsets(start, picture)
        key = 3 * start["keys"][1] + 6
        opened.drag(opened.handle("Key 3, 6"), 25, 30)
        dragged = opened.state()
        check_offsets(dragged, picture)
        assert dragged["chosen"] == key
        with_offsets = np.array(dragged["points"]) - start["points"]
        assert (with_offsets[key] > 0.5).all()
        assert not np.delete(with_offsets, key, axis=0).any()
        opened.press("ArrowLeft")
        assert_close(opened.state()["points"][key][1], dragged["points"][key][1] - 0.5)
        check_offsets(opened.state(), picture)
        opened.press("PageDown", "PageDown", "PageUp")
        assert opened.state()["chosen"] == key + 1


def test_no_drag_leads_out_of_the_square_of_s(browser, picture):
    with figure(browser, "offsets") as opened:
        opened.drag(opened.handle("Key 2, 3"), 300, 5)
        state = opened.state()
        check_offsets(state, picture)
        reference = to_pixels(reference_points(state["keys"], CELLS), state["size"], CELLS)[2, 3]
        reached = state["points"][state["chosen"]][1] - reference[1]
        assert 0.99 * state["limit"][1] < reached < state["limit"][1]


def test_offsets_in_every_convention_and_bound(browser, picture):
    with figure(browser, "offsets") as opened:
        opened.page.get_by_role("button", name="apart").click()
        for convention in Convention:
            opened.page.locator(f'input[value="{convention.name}"]').check(force=True)
            state = opened.state()
            assert state["convention"] == convention.name
            assert state["bound"] == ("CLAMP" if convention is Convention.DATPP2023 else "TANH_CELLS")
            check_offsets(state, picture)
        assert any(0 in slope for slope in state["slopes"])  # limited by the clamp
        opened.page.locator('input[value="TANH_CELLS"]').check(force=True)
        opened.page.locator("input[type=range]").focus()
        opened.press("ArrowRight", "ArrowRight", "ArrowRight")
        assert opened.state()["s"] == 3.5
        check_offsets(opened.state(), picture)


def test_no_offsets_at_the_start_of_the_page_on_conventions(browser, picture, tmp_path):
    """A page may set the initial state of its figure."""
    html = (standalone_pages() / "offsets.html").read_text(encoding="utf-8")
    start = 'offsets.mount(document.querySelector("[data-figure]")'
    assert html.count(start) == 1
    options = '{"wish": "none", "convention": "DATPP2023"}'
    (tmp_path / "offsets.html").write_text(html.replace(start, f"{start}, {options}"), encoding="utf-8")
    with figure(browser, "offsets", tmp_path) as opened:
        assert not np.any(opened.state()["raw"])
        check_offsets(opened.state(), picture)


# ------------------------------------------------------------------------------------------------ bias


def check_bias(state):
    size = tuple(state["size"])
    table = np.array(state["table"]).reshape(1, *(2 * length - 1 for length in size))
    points = from_pixels(np.array([[[state["key"]]]], dtype=float), size, CELLS)
    expected = table_bias(table, points, query_size=size, convention=CELLS)[0, 0, :, 0]
    assert_close(state["bias"], expected)
    assert_close(state["value"], expected[state["query"][0] * size[1] + state["query"][1]])
    assert_close(sum(state["weights"]), 1)


def test_bias_by_mouse_and_keys(browser):
    with figure(browser, "bias") as opened:
        start = opened.state()
        check_bias(start)
        opened.drag(opened.handle("Key"), -60, 45)
        dragged = opened.state()
        check_bias(dragged)
        assert dragged["key"] != start["key"]
        opened.press("ArrowUp", "Shift+ArrowLeft")
        assert_close(opened.state()["key"], (np.array(dragged["key"]) + [-0.1, -0.01]).round(2))
        check_bias(opened.state())
        opened.handle("Query").focus()
        opened.press("ArrowRight", "ArrowUp")
        assert opened.state()["query"] == [start["query"][0] - 1, start["query"][1] + 1]
        check_bias(opened.state())
        for name in ("key on a pixel", "half-way between pixels", "key over the border", "queries in turn"):
            opened.page.get_by_role("button", name=name).click()
            check_bias(opened.state())


# ------------------------------------------------------------------------------------------------ cost


def check_cost(state):
    side = state["side"]
    layer = Deformable(384, 12, 3, stride=2, kernel_size=5, size=(14, 14))
    systems = compared_systems(layer, 14)
    systems["deformable_fixed"] = replace(layer, stride=2 * state["times"])
    assert systems.keys() == state["amounts"].keys()
    for kind, config in systems.items():
        found = attention_terms(1, (side, side), config)
        whole = total(found)
        assert state["amounts"][kind] == {"macs": whole.macs, "kept": whole.saved_bytes}
        if kind == state["system"]:
            expected = {
                name: (term.macs, term.saved_bytes) for name, term in found.items() if term.macs or term.saved_bytes
            }
            assert {term["name"]: (term["macs"], term["kept"]) for term in state["terms"]} == expected


def shown_sum(opened):
    """Return the integer shown below the formulas."""
    words = opened.page.locator(".live-formulas tfoot td").last.inner_text()
    return int("".join(filter(str.isdigit, words)))


def test_cost_by_mouse_and_keys(browser):
    with figure(browser, "cost") as opened:
        check_cost(opened.state())
        opened.page.locator("input[type=range]").focus()
        opened.press("ArrowRight", "ArrowRight")
        assert opened.state()["times"] == 4
        check_cost(opened.state())
        opened.drag(opened.handle("Side of the image, memory for the backward pass"), 90, 0)
        dragged = opened.state()
        assert dragged["times"] > 4
        check_cost(dragged)
        opened.press("ArrowLeft")
        assert opened.state()["times"] < dragged["times"]
        for name, kind in (("plain attention", "multi_head"), ("window", "window"), ("Deformable DETR", "ms_deform")):
            opened.page.get_by_role("button", name=name, exact=True).click()
            state = opened.state()
            assert state["system"] == kind
            check_cost(state)
            for part in ("macs", "kept"):
                opened.page.locator(f'input[value="{part}"]').check(force=True)
                assert shown_sum(opened) == state["amounts"][kind][part]


# ------------------------------------------------------------------------------------------------ receptive field


@pytest.fixture(scope="module")
def seen_by():
    """Return the receptive field of each system's query by the spec, with offsets multiplied by a factor."""
    data = load("figures/live_data.py")
    structural = {
        "multi_head": MultiHeadAttentionConfig(12, 3),
        "pyramid": PyramidAttentionConfig(12, 3, 4),
        "window": WindowAttentionConfig(12, 3, 3),
        "shifted_window": WindowAttentionConfig(12, 3, 3, shift=1),
        "neighborhood": NeighborhoodAttentionConfig(12, 3, 3),
        "dilated": NeighborhoodAttentionConfig(12, 3, 3, dilation=3),
    }
    traces = {name: (data.run_layer(name), data.run_layer(name, with_offsets=False)) for name in data.SAMPLED_SYSTEMS}

    def seen(system, query, share):
        if system in structural:
            return receptive_field(query, data.SIZE, structural[system])
        trace, home = traces[system]
        points = trace.points_px if share == 1 else home.points_px + share * (trace.points_px - home.points_px)
        return receptive_field(query, data.SIZE, data.SAMPLED_SYSTEMS[system].config, replace(trace, points_px=points))

    return seen


def check_receptive_field(state, seen_by):
    query = tuple(state["query"])
    seen = seen_by(state["system"], query, state["moved"])
    assert np.array_equal(np.array(state["seen"], dtype=bool), seen.ravel())
    counts = {system: int(seen_by(system, query, state["moved"]).sum()) for system in state["counts"]}
    assert state["counts"] == counts


def test_receptive_field_by_mouse_and_keys(browser, seen_by):
    with figure(browser, "receptive_field") as opened:
        start = opened.state()
        check_receptive_field(start, seen_by)
        opened.drag(opened.handle("Query"), -120, 90)
        dragged = opened.state()
        check_receptive_field(dragged, seen_by)
        assert dragged["query"] != start["query"]
        assert dragged["seen"] == start["seen"]  # deformable attention: the same for every query
        opened.press("ArrowUp", "ArrowLeft")
        assert opened.state()["query"] == [dragged["query"][0] - 1, dragged["query"][1] - 1]
        check_receptive_field(opened.state(), seen_by)
        for number, system in enumerate(start["counts"]):
            opened.page.locator(".live-thumbnail").nth(number).click()
            assert opened.state()["system"] == system
            check_receptive_field(opened.state(), seen_by)
        opened.page.locator(".live-thumbnail").nth(6).click()
        opened.page.locator("input[type=range]").focus()
        for key in ("Home", "ArrowRight"):
            opened.press(key)
            check_receptive_field(opened.state(), seen_by)
        assert opened.state()["moved"] == 0.05


# ------------------------------------------------------------------------------------------------ all figures


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_and_follows_the_scheme(browser, name, scheme):
    with figure(browser, name, viewport={"width": 390, "height": 844}, color_scheme=scheme) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
        brightness = opened.page.evaluate(
            "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert (np.mean(brightness) > 200) == (scheme == "light")
        ink = opened.page.evaluate("getComputedStyle(document.querySelector('.live')).color.match(/\\d+/g).map(Number)")
        assert (np.mean(ink) < 100) == (scheme == "light")


@pytest.mark.parametrize("name", FIGURES)
def test_every_focusable_element_has_a_name(browser, name):
    with figure(browser, name) as opened:
        nameless = """() => [...document.querySelectorAll('[data-figure] :is(input, button, [tabindex])')]
            .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.closest('label')?.textContent.trim()))
            .map((e) => e.outerHTML)"""
        assert opened.page.evaluate(nameless) == []
        assert opened.page.evaluate("document.querySelectorAll('.live-handle:not([aria-valuetext])').length") == 0


@pytest.mark.parametrize(
    ("name", "right", "wrong", "check"),
    [
        ("sampling", "const [y, x] = point.map", "const [x, y] = point.map", check_sampling),
        ("bias", "(query - point) * scale", "(point - query) * scale", check_bias),
        ("cost", 'bias: "4 HW Ns M"', 'bias: "4 HW Ns"', check_cost),
    ],
)
def test_a_wrong_figure_is_detected(browser, tmp_path, name, right, wrong, check):
    html = (standalone_pages() / f"{name}.html").read_text(encoding="utf-8")
    assert html.count(right) == 1
    (tmp_path / f"{name}.html").write_text(html.replace(right, wrong), encoding="utf-8")
    with figure(browser, name, tmp_path) as opened, pytest.raises(AssertionError):
        check(opened.state())


def test_a_request_or_an_error_on_the_page_is_detected(browser, tmp_path):
    html = (standalone_pages() / "bias.html").read_text(encoding="utf-8")
    bad = '<img src="http://elsewhere.invalid/x.png"><script>missing();</script></body>'
    (tmp_path / "bias.html").write_text(html.replace("</body>", bad), encoding="utf-8")
    with tab(browser) as opened:
        opened.open(tmp_path / "bias.html")
        assert any(line.startswith("error: missing is not defined") for line in opened.errors)
        assert "request: http://elsewhere.invalid/x.png" in opened.errors
