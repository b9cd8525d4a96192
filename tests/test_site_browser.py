"""All pages of the site in a headless browser without access to other hosts."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

# Visible text of a formula that was not rendered.
UNSET = r"""() => {
  const left = [...document.querySelectorAll(".arithmatex")].filter((place) => !place.querySelector(".katex"));
  const failed = [...document.querySelectorAll(".katex-error")];
  const text = document.querySelector("main, body").cloneNode(true);
  text.querySelectorAll("pre, code, .katex, .clipboard-copy-txt, script, style").forEach((place) => place.remove());
  const raw = text.textContent.match(/\\\(|\\\[|\$\$|\\(frac|tilde|operatorname|mathrm)\b/);
  return [...left, ...failed].map((place) => place.textContent.slice(0, 60)).concat(raw ? [raw[0]] : []);
}"""


class Quiet(SimpleHTTPRequestHandler):
    """Request handler without log output."""

    def log_message(self, *args):
        """Print nothing."""


@pytest.fixture(scope="module")
def served(site_folder):
    """Serve the site on this machine; return its address and the paths of its pages."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site_folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = [path for path in sorted(site_folder.rglob("*.html")) if path.name != "404.html"]
    yield f"http://127.0.0.1:{server.server_port}/", [path.relative_to(site_folder).as_posix() for path in pages]
    server.shutdown()
    server.server_close()


def problems(page, address, root):
    """Open a page and return its problems: console output, errors, foreign or failed requests, unrendered formulas."""
    wrong = []
    listeners = {
        "console": lambda message: wrong.append(f"console: {message.text}"),
        "pageerror": lambda error: wrong.append(f"error: {error}"),
        "request": lambda request: (
            request.url.startswith((root, "data:", "blob:")) or wrong.append(f"request: {request.url}")
        ),
        "response": lambda answer: answer.status < 400 or wrong.append(f"{answer.status}: {answer.url}"),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.goto(address, wait_until="load")
    for place in page.locator("[data-figure]").all():
        place.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelectorAll('[data-figure]:not(.live)').length === 0")
    wrong += [f"formula: {text}" for text in page.evaluate(UNSET)]
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    return wrong


def test_every_page_opens_without_problems(chromium, served, site_folder):
    """No page has console output, requests to other hosts, failed requests or unrendered formulas.

    The landing page is opened with its search index, which takes as long to read as the rest of a page.
    """
    root, pages = served
    assert len(pages) > 30
    page = chromium.new_page()
    found = {"with search": problems(page, root, root)}
    index = json.loads((site_folder / "search" / "search_index.json").read_text(encoding="utf-8"))
    page.route("**/search_index.json", lambda route: route.fulfill(json={**index, "docs": []}))
    found |= {path: problems(page, root + path, root) for path in pages}
    page.close()
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    "path",
    ["index.html", "introduction/", "conventions/", "spec/sampling/", "spec/offsets/", "spec/bias/", "cost/", "peers/"],
)
def test_figures_respond_to_arrow_keys_on_their_pages(chromium, served, path):
    """Figures respond to arrow keys on their pages, also on a narrow screen; other tests check the values."""
    root, _ = served
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    page.goto(root + path)
    figure = page.locator("[data-figure].live").first
    figure.scroll_into_view_if_needed()
    before = figure.get_attribute("data-state")
    figure.locator(".live-handle").first.focus()
    page.keyboard.press("ArrowRight")  # right and up both increase a slider
    page.keyboard.press("ArrowUp")
    assert figure.get_attribute("data-state") != before
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


# Words that people type, and the start of the addresses that the first result may have.
SEARCHES = {
    "yolo": ("recipes/", "faq/"),
    "pretrained": "faq/",
    "faq": "faq/",
    "visualize": ("faq/", "notebooks/07"),
    "offset range": ("faq/", "spec/offsets/"),
    "2H-1": "faq/",
    "input size": "faq/",
    "lookup_22k": "faq/",
    "natten": "faq/",
    "deformable detr": ("faq/", "peers/deformable-detr/"),
    "install": ("install/", "quickstart-torch/"),
    "onnx": ("recipes/", "faq/"),
    "u-net": ("recipes/", "faq/"),
    "fine-tuning": "recipes/",
    "mixed precision": "recipes/",
    "draw_points": "api/",
}


def test_search_leads_to_answers(chromium, served):
    """The first result of each search is a page that answers it."""
    root, _ = served
    page = chromium.new_page()
    page.goto(root)
    page.keyboard.press("/")
    query = page.locator("[data-md-component='search-query']")
    result = page.locator(".md-search-result__link").first
    wrong = {}
    for words, expected in SEARCHES.items():
        query.fill("")
        query.press("Backspace")  # the search listens to keys
        result.wait_for(state="detached")
        query.press_sequentially(words)
        page.wait_for_timeout(200)  # results of the first letters are replaced by those of the words
        result.wait_for(state="attached")
        first = result.get_attribute("href").removeprefix(root)
        if not first.startswith(expected):
            wrong[words] = first
    page.close()
    assert wrong == {}


@pytest.fixture
def phone(chromium):
    """Return a page of a phone."""
    context = chromium.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    yield context.new_page()
    context.close()


HIT = """(places, [left, reach]) => places.map((place) => {
  const box = place.querySelector(".live-dot, .live-hit").getBoundingClientRect();
  const at = [box.x + box.width / 2 + (left ? -reach : reach), box.y + box.height / 2];
  return place.contains(document.elementFromPoint(...at));
})"""


@pytest.mark.parametrize("path", ["spec/sampling/", "cost/"])
def test_handles_are_large_enough_for_fingers(phone, served, path):
    """A handle is hit up to 21 pixels from its center, and not 40 pixels from it."""
    root, _ = served
    phone.goto(root + path)
    handles = phone.locator("[data-figure].live .live-handle")
    handles.first.scroll_into_view_if_needed()
    one = phone.locator("[data-figure].live").first.locator(".live-handle").locator("nth=0")
    for left in (False, True):
        assert one.evaluate(f"(place) => ({HIT})([place], [{str(left).lower()}, 21])") == [True]
    assert one.evaluate(f"(place) => ({HIT})([place], [false, 40])") == [False]
    controls = phone.locator(".live-button:visible, .live-choice span:visible").all()
    assert all(control.bounding_box()["height"] >= 44 for control in controls)


def test_notebooks_fit_a_phone(phone, served):
    """On a phone, prompts are hidden, code is folded, and the page does not scroll sideways."""
    root, pages = served
    for path in (page for page in pages if page.startswith("notebooks/")):
        phone.goto(root + path)
        assert phone.locator(".jp-InputPrompt:visible, .jp-OutputPrompt:visible").count() == 0, path
        assert phone.locator("details.fold").count() > 5, path
        assert phone.locator("details.fold[open]").count() == 0, path
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390, path
        for picture in phone.locator(".jp-OutputArea-output img").all():
            assert picture.bounding_box()["width"] >= 340, path


def test_wide_tables_keep_their_first_column(phone, served):
    """A table that scrolls sideways on a phone keeps its first column in view."""
    root, _ = served
    phone.goto(root + "releases/")
    table = phone.locator("table:has(td)").first
    cell = table.locator("td").first
    table.scroll_into_view_if_needed()
    before = cell.bounding_box()["x"]
    moved = table.evaluate(
        """(table) => {
          let place = table;
          while (place.scrollWidth <= place.clientWidth) place = place.parentElement;
          place.scrollLeft = 200;
          return place.scrollLeft;
        }"""
    )
    assert moved > 60
    assert abs(cell.bounding_box()["x"] - before) < 25


def test_live_figures_are_pictures_without_javascript(chromium, served):
    root, _ = served
    context = chromium.new_context(viewport={"width": 390, "height": 800}, java_script_enabled=False)
    page = context.new_page()
    for path in ("spec/sampling/", "spec/bias/", "cost/", "peers/"):
        page.goto(root + path)
        picture = page.locator("[data-figure] noscript img").first
        picture.scroll_into_view_if_needed()
        assert picture.bounding_box()["width"] > 300, path
    context.close()


def test_paper_has_no_controls(chromium, served):
    """On paper there are neither tabs nor folded code."""
    root, pages = served
    page = chromium.new_page()
    page.goto(root + next(path for path in pages if path.startswith("notebooks/01")))
    folded = page.locator("details.fold, .md-tabs")
    assert folded.locator("visible=true").count() > 5
    page.emulate_media(media="print")
    assert folded.locator("visible=true").count() == 0
    page.close()


def test_problems_of_a_page_are_detected(chromium, tmp_path_factory):
    """The checker detects console output, a missing file, another host and an unrendered formula."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "index.html").write_text(
        "<main><span class='arithmatex'>\\(x\\)</span><script src='none.js'></script>"
        "<img src='http://elsewhere.invalid/a.png'><script>console.log('hello')</script></main>",
        encoding="utf-8",
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    page = chromium.new_page()
    wrong = " ".join(problems(page, root + "index.html", root))
    page.close()
    server.shutdown()
    server.server_close()
    for word in ("hello", "none.js", "elsewhere", "formula"):
        assert word in wrong
