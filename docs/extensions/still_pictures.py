"""Live figures without JavaScript: a still picture in their place, where there is one."""

import re
from pathlib import Path
from typing import Any

from mkdocs.utils import get_relative_url

FIGURE = re.compile(r'(<div data-figure="(\w+)"[^>]*>)(?:<noscript>.*?</noscript>)?</div>', re.DOTALL)
TITLE = re.compile(r'^export const title = "(.*)";$', re.MULTILINE)


def on_page_content(html: str, *, page: Any, config: Any, **_: Any) -> str:
    """Put the picture of each live figure into its `<noscript>`."""
    docs = Path(config.docs_dir)

    def still(figure: re.Match[str]) -> str:
        picture = next((docs / "images").glob(f"still_{figure[2]}.*"), None)
        if picture is None:
            return figure[0]
        title = TITLE.search((docs / "js" / "figures" / f"{figure[2]}.mjs").read_text(encoding="utf-8"))
        source = get_relative_url(f"images/{picture.name}", page.url)
        alt = f"Still picture of the live figure. {title[1] if title else ''}".strip()
        return f'{figure[1]}<noscript><img src="{source}" alt="{alt}" width="760"></noscript></div>'

    return FIGURE.sub(still, html)
