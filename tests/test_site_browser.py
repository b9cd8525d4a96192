"""All pages of the site in a headless browser without access to other hosts."""

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


def test_every_page_opens_without_problems(chromium, served):
    """No page has console output, requests to other hosts, failed requests or unrendered formulas."""
    root, pages = served
    assert len(pages) > 30
    page = chromium.new_page()
    found = {path: problems(page, root + path, root) for path in pages}
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
