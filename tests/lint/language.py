"""Language lint: first words of docstrings, and words that this project replaces by standard terms.

    python tests/lint/language.py

prints one line for each finding, ``file:line: message``, and exits with 1 if there is one.

- A docstring starts with a noun phrase or an imperative verb, never with a question word or with "of".
- Prose uses the standard term: in docstrings, comments and string literals of the package, in docstrings and comments
  of the tests, experiments and scripts in docs/, in the notebooks, and in the Markdown pages. Code is not prose: names
  in backticks, fenced blocks, doctests and formulas are skipped.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

FIRST_WORDS = ("what", "which", "who", "whose", "whom", "where", "how", "when", "whether", "why", "of")

# (pattern, standard term). A space in a pattern is any white space. Patterns ignore case.
BANNED = (
    (r"(?:re)?told", "given, reported, printed, stated or distinguished"),
    (r"dear(?:er|est)?", "expensive"),
    (r"(?<![-])(?:handed|hands) (?:to|over|on|out|down|back|in|it|them|the|a|an)", "passed, returned"),
    (r"(?:is|are|was|were|be|been|being) handed", "passed, given"),
    (r"(?:asked|asks|asking|ask) for", "requested, required; request, require"),
    (r"cut_windows", "window_partition"),
    (r"lay_windows", "window_reverse"),
    (r"logarithms? of the sums? of (?:the |their )?exponentials?", "log-sum-exp, lse"),
    (r"(?:the|its|their|whose) reach|visibility", "receptive field"),
    (r"contenders?", "candidate, implementation"),
    (r"at rest", "at the reference points, with zero offsets"),
    (r"twins?", "the baseline without offsets"),
    (r"first values", "initialization"),
    (r"(?:is|was) that of", "name the thing again, or 'equals the … of'"),
    (r"knock[- ]?outs?|knocked out", "ablation at test time"),
    (r"beside", "next to, besides"),
    (r"anew", "again"),
    (r"(?:gone|goes|go|going|went) on with", "resumed, continued"),
    (r"carried out", "computed, done"),
    (r"(?:let|lets|letting) go of", "released, dropped"),
    (r"thereof", "of it"),
    (r"rightly", "correctly"),
    (r"as (?:it is|they are) asked for", "on demand"),
    (r"as wide as can be", "as wide as possible"),
)

# (file, stripped text of the line) of a finding that is meant.
ALLOWED: frozenset[tuple[str, str]] = frozenset(
    {
        ("dat_ref/torch/functional/__init__.py", '"cut_windows": "window_partition",'),  # deprecated names
        ("dat_ref/torch/functional/__init__.py", '"lay_windows": "window_reverse",'),
    }
)

PYTHON_FOLDERS = ("dat_ref", "tests", "docs", "experiments", "notebooks")  # docstrings and comments
STRING_FOLDERS = ("dat_ref/", "notebooks/")  # string literals as well
PAGES = ("README.md", "CONTRIBUTING.md")  # and all pages of docs/
SKIPPED = ("tests/lint/language.py", "tests/test_language_lint.py")  # they name the words

_PATTERNS = [
    (re.compile(r"(?<![\w-])(?:" + pattern.replace(" ", r"\s+") + r")(?![\w-])", re.IGNORECASE), term)
    for pattern, term in BANNED
]
_NAME = re.compile(r"\w*_\w*")  # a literal that is a name, such as a key of a table of renamed functions
_CODE_SPAN = re.compile(r"(`+)[^`](?:.|\n)*?(?<!`)\1(?!`)")
_FORMULA = re.compile(r"\\\(.*?\\\)|\\\[.*?\\\]|\$\$.*?\$\$", re.DOTALL)
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,}).*?^\1\2[ \t]*$", re.DOTALL | re.MULTILINE)
_TAG = re.compile(r"<[^<>]*>|\]\([^()\s]*\)")  # HTML tags and the targets of links
_DOCTEST = re.compile(r"^[ \t]*>>> .*(?:\n[ \t]*\S.*)*", re.MULTILINE)


class Finding(NamedTuple):
    """A place that breaks a rule: file relative to the root, line from 1, message."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


class Passage(NamedTuple):
    """A stretch of prose, and its first and last line in the file."""

    first: int
    last: int
    text: str


# ------------------------------------------------------------------------------------------------ docstrings


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            constant = first.value if isinstance(first, ast.Expr) else None
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                yield constant


def docstring_findings(path: str, source: str) -> list[Finding]:
    """Return the docstrings of a Python file that start with one of `FIRST_WORDS`."""
    findings = []
    for node in _docstring_nodes(ast.parse(source)):
        word = re.match(r"\W*(\w+)", node.value)
        if word and word[1].lower() in FIRST_WORDS:
            message = f"docstring starts with {word[1]!r}: start with a noun phrase or an imperative verb"
            findings.append(Finding(path, node.lineno, message))
    return findings


# ------------------------------------------------------------------------------------------------ words


def _blank(pattern: re.Pattern[str], text: str) -> str:
    """Replace every match by spaces, so that positions and lines stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _comments(source: str) -> Iterator[Passage]:
    """Yield the comments of a Python file, consecutive full-line comments as one passage."""
    block: list[str] = []
    start = column = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, text = token.start[0], token.string.lstrip("#!")
        if block and row == start + len(block) and token.start[1] == column:
            block.append(text)
            continue
        if block:
            yield Passage(start, start + len(block) - 1, "\n".join(block))
        block, start, column = [text], row, token.start[1]
    if block:
        yield Passage(start, start + len(block) - 1, "\n".join(block))


def _strings(source: str, *, literals: bool) -> Iterator[Passage]:
    """Yield the docstrings of a Python file, and its other string literals if `literals`."""
    tree = ast.parse(source)
    docstrings = {id(node) for node in _docstring_nodes(tree)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        if id(node) in docstrings or (literals and not _NAME.fullmatch(node.value)):
            yield Passage(node.lineno, node.end_lineno or node.lineno, _blank(_DOCTEST, node.value))


def _prose(path: str, source: str) -> Iterator[Passage]:
    """Yield the prose of a Python or Markdown file."""
    if path.endswith(".py"):
        yield from _comments(source)
        yield from _strings(source, literals=path.startswith(STRING_FOLDERS))
    else:
        yield Passage(1, source.count("\n") + 1, _blank(_TAG, _blank(_FORMULA, _blank(_FENCE, source))))


def _line_of(word: str, passage: Passage, position: int, lines: list[str]) -> int:
    """Return the line of a word: the nearest that contains it, because escapes and joined literals shift the count."""
    counted = passage.first + passage.text.count("\n", 0, position)
    candidates = [n for n in range(passage.first, passage.last + 1) if word in lines[n - 1]]
    return min(candidates, key=lambda n: abs(n - counted), default=passage.first)


def word_findings(path: str, source: str, allowed: frozenset[tuple[str, str]] = ALLOWED) -> list[Finding]:
    """Return the replaced words in the prose of a Python or Markdown file."""
    lines = source.split("\n")
    findings = []
    for passage in _prose(path, source):
        text = _blank(_CODE_SPAN, passage.text)
        for pattern, term in _PATTERNS:
            for match in pattern.finditer(text):
                words = match[0].split()
                line = _line_of(words[0], passage, match.start(), lines)
                if (path, lines[line - 1].strip()) not in allowed:
                    findings.append(Finding(path, line, f"{' '.join(words)!r}: use a standard term ({term})"))
    return findings


# ------------------------------------------------------------------------------------------------ the tree


def check_file(path: str, source: str) -> list[Finding]:
    """Return all findings of a file by its path relative to the root, in order of their lines."""
    findings = docstring_findings(path, source) if path.endswith(".py") else []
    return sorted({*findings, *word_findings(path, source)}, key=lambda finding: finding.line)


def files(root: Path) -> list[str]:
    """Return the files that are checked, relative to the root."""
    python = [path for folder in PYTHON_FOLDERS for path in (root / folder).rglob("*.py")]
    pages = [*(root / "docs").rglob("*.md"), *(root / name for name in PAGES)]
    names = (path.relative_to(root).as_posix() for path in (*python, *pages) if path.is_file())
    return sorted(name for name in names if name not in SKIPPED)


def check_tree(root: Path) -> list[Finding]:
    """Return all findings below the root."""
    return [found for name in files(root) for found in check_file(name, (root / name).read_text(encoding="utf-8"))]


def main() -> int:
    """Print the findings of this project; return 1 if there are any."""
    findings = check_tree(ROOT)
    for finding in findings:
        print(finding)
    if findings:
        print(f"{len(findings)} findings in {len({finding.path for finding in findings})} files")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
