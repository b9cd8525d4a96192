"""Figures of the introduction and the network in the page, in a headless browser: they show the spec's values."""

import base64
import json
from contextlib import contextmanager

import numpy as np
import pytest
from helpers.browser import tab
from helpers.figures import DOCS, load
from helpers.painting import Painting

from dat_ref import Convention, OffsetBound
from dat_ref.ops.coverage import fixed_grid_bound, hit_rate, read_pixels
from dat_ref.ops.grid import reference_points, to_pixels
from dat_ref.ops.offsets import bound_offsets
from dat_ref.ops.sampling import bilinear_sample

CELLS = Convention.CELL_CENTER
FIGURES = ("painting", "attention", "leash", "sampling", "gradient", "keys", "live")
OPTIONS = {"sampling": {"choices": True}}


@pytest.fixture(scope="module")
def write_page(tmp_path_factory):
    """Return a function that writes a page with one figure and returns its path."""
    bundle, folder = load("extensions/live_figures.py"), tmp_path_factory.mktemp("figures")

    def write(name, options):
        path = folder / f"{name}.html"
        modules = bundle.dependency_order((bundle.MODULES / f"{name}.mjs").resolve())
        html = bundle.PAGE.format(
            name=name,
            title=name,
            caption="",
            style=(DOCS / "css" / "figures.css").read_text(encoding="utf-8"),
            page_style=bundle.PAGE_STYLE,
            script="\n".join(map(bundle.to_function, modules)),
        )
        place = 'querySelector("[data-figure]"));'
        assert html.count(place) == 1
        path.write_text(html.replace(place, f"{place[:-2]}, {json.dumps(options)});"), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def lesson():
    """Return the data of the painting."""
    text = (DOCS / "js" / "figures" / "data" / "lesson.mjs").read_text(encoding="utf-8")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


@pytest.fixture(scope="module")
def spec(lesson):
    """Return a function that makes the spec's painting of the photograph."""
    pixels = np.frombuffer(base64.b64decode(lesson["pixels"]), np.uint8).reshape(*lesson["size"], 3).astype(float)

    def make(sharpness=lesson["sharpness"], near=lesson["near"]):
        return Painting(pixels, sharpness, near)

    return make


@contextmanager
def figure(chromium, write_page, name, options=None, **browser):
    """Open a figure; at the end, fail if its page had errors."""
    with tab(chromium, **browser) as opened:
        opened.open(write_page(name, OPTIONS.get(name, {}) if options is None else options))
        opened.page.wait_for_selector("[data-state]")
        yield opened
        assert opened.errors == []


def assert_close(found, expected, tolerance=1e-9):
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ painting


def test_the_painting_has_the_error_of_the_spec(chromium, write_page, spec, lesson):
    """A dragged point, arrow keys and the three choices: the error is the spec's for the points shown."""
    with figure(chromium, write_page, "painting") as opened:
        grid = opened.state()
        assert_close(grid["error"], spec().error(grid["points"]))
        assert_close(grid["points"], to_pixels(reference_points((4, 6), CELLS), (40, 60), CELLS).reshape(-1, 2))
        opened.drag(opened.handle("Point 2, 3"), 5, -30)
        dragged = opened.state()
        assert dragged["mode"] == "yours"
        assert dragged["points"][8] != grid["points"][8]
        assert_close(dragged["error"], spec().error(dragged["points"]))
        opened.press("ArrowLeft", "Shift+ArrowUp", "PageDown", "ArrowDown")
        pressed = opened.state()
        assert_close(np.array(pressed["points"])[[8, 9]] - np.array(dragged["points"])[[8, 9]], [[-0.1, -1], [1, 0]])
        opened.page.locator('input[value="learned"]').check(force=True)
        learned = opened.state()
        assert learned["points"] == lesson["learned"]
        assert_close(learned["error"], spec().error(lesson["learned"]))
        assert learned["error"] < grid["error"] / 3
        opened.page.locator('input[value="yours"]').check(force=True)
        assert opened.state()["points"] == pressed["points"]


def test_a_finger_moves_a_point_and_not_the_page(chromium, write_page):
    options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with figure(chromium, write_page, "painting", **options) as opened:
        start = np.array(opened.state()["points"])
        opened.touch(opened.handle("Point 3, 4"), 20, 30)
        moved = np.array(opened.state()["points"]) - start
        assert (moved[15] > 1).all()
        assert not np.delete(moved, 15, axis=0).any()
        assert opened.page.evaluate("scrollY") == 0


@pytest.mark.slow  # trains the layer of the first notebook
def test_learned_points_are_those_of_the_notebook(lesson, spec):
    """`python docs/figures/painting.py` regenerates them; the notebook's layer paints with the same error."""
    found = load("figures/painting.py").painting()
    for name in ("size", "keys", "sharpness", "near", "pixels"):
        assert found[name] == lesson[name]
    for name in ("activated", "pointwise", "learned"):
        assert_close(found[name], lesson[name], 2e-2)  # another processor rounds otherwise in 200 steps
    notebook = load("figures/painting.py").lesson(until="network")
    assert abs(spec().error(lesson["learned"]) - notebook["errors"][-1]) < 2e-5


# ------------------------------------------------------------------------------------------------ attention


def test_attention_of_a_pixel_is_that_of_the_spec(chromium, write_page, spec, lesson):
    """The pixel's weights over the points sum to one and mix the color that the spec paints there."""
    options = {"modes": ["learned", "grid", "window", "everywhere"], "query": [32, 35]}
    with figure(chromium, write_page, "attention", options) as opened:
        opened.handle("Pixel").focus()
        opened.press("ArrowUp", "Shift+ArrowRight")
        state = opened.state()
        assert state["query"] == [29, 36]
        corner = [20, 30]
        keys = {
            "learned": lesson["learned"],
            "grid": to_pixels(reference_points((4, 6), CELLS), (40, 60), CELLS).reshape(-1, 2),
            "window": np.argwhere(np.ones((10, 10))) + corner,
            "everywhere": np.argwhere(np.ones((40, 60))),
        }
        for mode, points in keys.items():
            opened.page.locator(f'input[value="{mode}"]').check(force=True)
            state = opened.state()
            _, painted = spec().paint(np.asarray(points, dtype=float))
            assert_close(state["mixed"], painted[0, 0, 29 * 60 + 36, :3])
            assert_close(sum(state["weights"]), 1)


# ------------------------------------------------------------------------------------------------ offsets


def test_the_leash_is_the_bound_of_the_spec(chromium, write_page):
    with figure(chromium, write_page, "leash") as opened:
        reference = reference_points((4, 6), CELLS)

        def check():
            state = opened.state()
            raw = np.array(state["raw"], dtype=float).reshape(1, 1, 4, 6, 2)
            options = {"offset_range": state["s"], "convention": CELLS}
            _, points = bound_offsets(raw, reference, OffsetBound.TANH_CELLS, **options)
            assert_close(state["points"], to_pixels(points, (40, 60), CELLS).reshape(-1, 2))
            moved = np.abs(np.array(state["points"]) - to_pixels(reference, (40, 60), CELLS).reshape(-1, 2))
            assert moved.max() <= 10 * state["s"] / 2
            return state

        check()
        opened.page.locator("input[type=range]").focus()
        opened.press("ArrowLeft", "ArrowLeft")
        assert check()["s"] == 1
        opened.drag(opened.handle("Point 2, 5"), 300, 0)
        state = check()
        assert state["points"][10][1] < 49.5  # the border of its cell
        assert "no two points can meet" in opened.page.locator(".live-note").inner_text()
        opened.page.get_by_role("button", name="zero offsets").click()
        assert not np.any(check()["raw"])


# ------------------------------------------------------------------------------------------------ sampling


def test_rounding_has_no_slope(chromium, write_page):
    with figure(chromium, write_page, "sampling") as opened:
        for name in ("bias", "features"):
            opened.page.locator(f'input[value="{name}"]').check(force=True)
            opened.page.locator('input[value="interpolate"]').check(force=True)
            state = opened.state()
            picture = np.array(state["map"], dtype=float).reshape(1, 1, 4, 5)
            assert_close(state["value"], bilinear_sample(picture, np.array([[state["point"]]]))[0, 0, 0])
            assert any(state["slope"])
            opened.page.locator('input[value="round"]').check(force=True)
            state = opened.state()
            assert state["value"] == picture[0, 0, round(state["point"][0]), round(state["point"][1])]
            assert state["slope"] == [0, 0]


# ------------------------------------------------------------------------------------------------ gradient


def test_both_paths_of_the_gradient_are_those_of_the_spec(chromium, write_page, spec):
    """Steps along both paths end at a smaller error than steps along one."""
    painting = spec(10, 4)
    with figure(chromium, write_page, "gradient") as opened:

        def check():
            state = opened.state()
            points = np.array(state["points"])
            features, bias = painting.gradient(points)
            assert_close(state["features"], features)
            assert_close(state["bias"], bias)
            assert_close(state["error"], painting.error(points))
            return state

        start = check()
        opened.page.get_by_role("button", name="step", exact=True).click()
        stepped = check()
        assert stepped["error"] < start["error"]
        assert sum(a != b for a, b in zip(start["points"], stepped["points"])) == 1
        ends = {}
        for path in ("both", "features", "bias"):
            opened.page.get_by_role("button", name="back to the grid").click()
            opened.page.locator(f'input[value="{path}"]').check(force=True)
            opened.page.get_by_role("button", name="30 steps").click()
            ends[path] = check()["error"]
        assert ends["both"] < 0.5 * start["error"]
        assert ends["both"] < 0.95 * ends["features"]
        assert ends["both"] < ends["bias"]


# ------------------------------------------------------------------------------------------------ number of keys


def test_the_bound_is_that_of_the_law(chromium, write_page):
    with figure(chromium, write_page, "keys") as opened:

        def check():
            state = opened.state()
            stride, side, (row, column) = state["stride"], state["side"], state["target"]
            read = read_pixels((16, 16), stride)
            assert state["seen"] == read[row : row + side, column : column + side].any()
            hits = hit_rate((16, 16), stride, (side, side))
            assert_close([state["hits"], state["bound"]], [hits, fixed_grid_bound(hits, 7)])
            return state

        check()
        opened.handle("Target").focus()
        for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowDown"):
            opened.press(key)
            check()
        opened.page.locator("input[type=range]").first.focus()
        opened.press("ArrowRight")
        assert check()["stride"] == 4
        opened.page.locator("input[type=range]").last.focus()
        opened.press("ArrowLeft")
        assert check()["side"] == 2
        opened.page.locator('input[value="objects"]').check(force=True)
        assert check()["study"] == "objects"


# ------------------------------------------------------------------------------------------------ the network


def test_points_follow_the_object(chromium, write_page, tmp_path):
    """A found object, zero offsets, nothing, and a picture of the reader's own that is never sent anywhere."""
    with figure(chromium, write_page, "live") as opened:
        start = opened.state()
        assert max(start["shares"], key=start["shares"].get) == start["kind"]
        opened.drag(opened.handle("Object"), 90, -60)
        dragged = opened.state()
        assert dragged["place"] != start["place"]
        assert dragged["points"] != start["points"]
        opened.page.locator('input[value="zero"]').check(force=True)
        still = np.array(opened.state()["points"])
        assert_close(still[0], to_pixels(reference_points((4, 4), CELLS), (40, 40), CELLS).reshape(-1, 2), 1e-5)
        assert_close(still[0], still[1])
        opened.page.locator('input[value="own"]').check(force=True)
        opened.page.get_by_role("button", name="nothing").click()
        assert max(opened.state()["shares"], key=opened.state()["shares"].get) == "nothing"
        image = pytest.importorskip("PIL.Image")
        image.fromarray(np.full((90, 120, 3), 200, np.uint8)).save(tmp_path / "own.png")
        opened.page.locator("input[type=file]").set_input_files(tmp_path / "own.png")
        opened.page.wait_for_function(
            "JSON.parse(document.querySelector('[data-figure]').dataset.state).photograph === 'own'"
        )


# ------------------------------------------------------------------------------------------------ all figures


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_and_follows_the_scheme(chromium, write_page, name, scheme):
    options = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme}
    with figure(chromium, write_page, name, **options) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
        ink = opened.page.evaluate("getComputedStyle(document.querySelector('.live')).color.match(/\\d+/g).map(Number)")
        assert (np.mean(ink) < 100) == (scheme == "light")
        nameless = """() => [...document.querySelectorAll('[data-figure] :is(input, button, [tabindex])')]
            .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.closest('label')?.textContent.trim()))
            .map((e) => e.outerHTML)"""
        assert opened.page.evaluate(nameless) == []
