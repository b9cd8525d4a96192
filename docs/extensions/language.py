"""Language of a page: ``lang: zh-Hans`` in its header becomes the attribute of its root element."""

from typing import Any


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Replace the language of the theme by that of the page."""
    language = page.meta.get("lang")
    return output.replace('<html lang="en"', f'<html lang="{language}"', 1) if language else output
