"""Headless Chromium that cannot reach other hosts, and pages opened in it."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium(playwright):
    """Return the path of a Chromium: the system's, or the one that playwright has installed; else None."""
    system = next(filter(None, map(shutil.which, NAMES)), None)
    bundled = playwright.chromium.executable_path
    return system or (bundled if bundled and os.path.exists(bundled) else None)


class FigurePage:
    """A figure's file in a tab, with the errors that occurred there."""

    def __init__(self, page):
        self.page, self.errors = page, []
        page.on("console", lambda message: self.errors.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.errors.append(f"error: {error}"))
        page.on("request", self._watch)

    def _watch(self, request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.errors.append(f"request: {request.url}")

    def open(self, path: Path):
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("[data-figure].live")

    def state(self):
        """Return the values that the figure shows."""
        return json.loads(self.page.get_attribute("[data-figure]", "data-state"))

    def handle(self, label):
        return self.page.locator(f'.live-handle[aria-label^="{label}."]').first

    def drag(self, handle, right, down):
        """Drag a handle with the mouse by screen pixels."""
        handle.scroll_into_view_if_needed()
        x, y = center(handle)
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + right / 2, y + down / 2)
        self.page.mouse.move(x + right, y + down)
        self.page.mouse.up()

    def touch(self, handle, right, down):
        """Drag a handle with a finger by screen pixels."""
        handle.scroll_into_view_if_needed()
        x, y = center(handle)
        finger = self.page.context.new_cdp_session(self.page)
        for kind, share in (("touchStart", 0), ("touchMove", 0.5), ("touchMove", 1)):
            point = {"x": x + share * right, "y": y + share * down}
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)


def center(handle):
    box = handle.locator(".live-hit").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@contextmanager
def tab(browser, **options):
    """Open a tab without animations, so that every change is immediate; close it at the end."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options})
    try:
        yield FigurePage(context.new_page())
    finally:
        context.close()
