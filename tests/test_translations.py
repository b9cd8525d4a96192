"""Translations keep in step: sections, numbers, links, figures and code are those of the English text."""

import re
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAIRS = [("README.md", "README.zh.md"), ("docs/introduction.md", "docs/introduction.zh.md")]

HEADING = re.compile(r"^(#+) .*$", re.M)
PARTS = {
    "figures": re.compile(r"<div data-figure=[^>]*>"),
    "folded": re.compile(r'^\?\?\? (\w+) "', re.M),
    "code": re.compile(r"^```\w+\n(.*?)^```", re.M | re.S),
    "links": re.compile(r"\]\(([^)]+)\)"),
    "rows": re.compile(r"^(\|)", re.M),
    "items": re.compile(r"^(-|\d+\.) ", re.M),
}
LANGUAGES = {"README.md", "README.zh.md"}  # links from one language to the other
# A thousands separator is part of a number, a period at the end of a sentence is not.
NUMBER = re.compile(r"(?<![\w.])\d[\d\u00a0\u202f]*(?:[.,]\d+)*(?:e-?\d+)?")


def sections(text):
    """Return the level and the text of each section, the part before the first heading included."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    code = PARTS["code"].findall(body)  # may contain lines that look like headings
    for block in code:
        body = body.replace(block, block.replace("#", "\0"))
    found = list(HEADING.finditer(body))
    ends = [match.start() for match in found[1:]] + [len(body)]
    return [(len(match[1]), body[match.end() : end]) for match, end in zip(found, ends, strict=True)]


def differences(english, translated):
    """Return what a translation has otherwise than its original."""
    found = []
    for index, (one, other) in enumerate(zip_longest(sections(english), sections(translated))):
        if one is None or other is None or one[0] != other[0]:
            return [*found, f"section {index}: a heading is missing or has another level"]
        for name, pattern in PARTS.items():
            ours, theirs = (
                [each for each in pattern.findall(text[1]) if each not in LANGUAGES] for text in (one, other)
            )
            if ours != theirs:
                found.append(f"section {index}: other {name}: {ours} and {theirs}")
        ours, theirs = ({re.sub(r"\D", "", each) for each in NUMBER.findall(text[1])} for text in (one, other))
        if ours != theirs:
            found.append(f"section {index}: other numbers: {ours ^ theirs}")
    return found


@pytest.mark.parametrize(("original", "translation"), PAIRS)
def test_translation_is_in_step(original, translation):
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in (original, translation)]
    assert len(sections(texts[0])) > 5
    assert differences(*texts) == []


ENGLISH = """# Title

One of 24 points reads 5.8 ‰, [see](a.md).

## Part

```bash
# run
make 3
```
"""


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("24", "25", "numbers"),
        ("5.8", "5.9", "numbers"),
        ("a.md", "b.md", "links"),
        ("# run", "# walk", "code"),
        ("## Part", "Part", "heading"),
        ("## Part", "### Part", "heading"),
    ],
)
def test_a_translation_out_of_step_is_detected(old, new, kind):
    assert differences(ENGLISH, ENGLISH.replace("reads", "liest")) == []
    assert any(kind in each for each in differences(ENGLISH, ENGLISH.replace(old, new)))


def test_a_translated_page_names_its_language(site_folder):
    pages = {
        path: (site_folder / path / "index.html").read_text(encoding="utf-8") for path in ("introduction.zh", "faq")
    }
    assert '<html lang="zh-Hans"' in pages["introduction.zh"]
    assert '<html lang="en"' in pages["faq"]
