"""Photograph each live figure for readers without JavaScript: docs/images/still_*.

    python docs/figures/stills.py

It opens the figures that the site has as files of their own (site/figures-live) in Chromium through playwright. Run it
after `make docs`.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
COLORS = 64  # of a drawing without a photograph
PHOTOGRAPHS = ("offsets",)


def main() -> None:
    """Write one picture for each bundled figure."""
    with sync_playwright() as playwright:
        system = next(filter(None, map(shutil.which, NAMES)), None)
        browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox", "--disable-gpu"])
        options = {"viewport": {"width": 800, "height": 900}, "device_scale_factor": 1.5, "reduced_motion": "reduce"}
        page = browser.new_context(**options).new_page()
        for path in sorted((DOCS.parent / "site" / "figures-live").glob("*.html")):
            page.goto(path.as_uri())
            figure = page.locator("[data-figure].live")
            picture = Image.open(io.BytesIO(figure.screenshot())).convert("RGB")
            target = DOCS / "images" / f"still_{path.stem}"
            if path.stem in PHOTOGRAPHS:
                picture.save(target.with_suffix(".jpg"), quality=80, optimize=True)
            else:
                picture.quantize(COLORS).save(target.with_suffix(".png"), optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
