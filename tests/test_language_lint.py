"""Language lint: every rule rejects a wrong example and accepts a right one; the repository is clean."""

import pytest
from lint import language

# One sentence for each pattern of `language.BANNED`, in the same order, and the sentence in standard terms.
SENTENCES = [
    ("The kernel is told the stride.", "The kernel takes the stride as an argument."),
    ("Gathering is dear.", "Gathering is expensive."),
    ("The loop handed the tile to a thread.", "The loop passed the tile to a thread."),
    ("Every check is handed a case.", "Every check is given a case."),
    ("Gradients are computed if they are asked for.", "Gradients are computed if they are requested."),
    ("The inverse of cut_windows.", "The inverse of window_partition."),
    ("The inverse of lay_windows.", "The inverse of window_reverse."),
    ("The logarithm of the sum of the exponentials.", "The log-sum-exp of a row."),
    ("A window limits the reach of a query.", "Offsets reach up to two cells, but the receptive field is small."),
    ("Every contender runs once.", "Every candidate runs once."),
    ("The points are at rest.", "The points are the rest of the input."),
    ("Compared with its twin.", "Compared with the baseline without offsets."),
    ("The first values are drawn here.", "The initialization draws the first value here."),
    ("The order is that of the file.", "The order equals the order of the file."),
    ("A knock-out of the offsets.", "An ablation of the offsets at test time."),
    ("The table is beside the map.", "The table is next to the map; besides, it is small."),
    ("The run starts anew.", "The run starts again."),
    ("The run goes on with step 3.", "The run continues at step 3."),
    ("The sum is carried out in float32.", "The sum is computed in float32."),
    ("The group lets go of its memory.", "The group lets the caller release memory."),
    ("The map and the size thereof.", "The map and its size."),
    ("The object is named rightly.", "The object is named correctly."),
    ("Rows are read as they are asked for.", "Rows are read on demand."),
    ("The window is as wide as can be.", "The window is as wide as possible."),
]


@pytest.mark.parametrize(("index", "wrong", "right"), [(i, *pair) for i, pair in enumerate(SENTENCES)])
def test_words(index, wrong, right):
    """Each pattern matches its wrong sentence; no pattern matches the right one."""
    pattern, term = language.BANNED[index]
    found = language.word_findings("page.md", f"A title\n\n{wrong}\n")
    assert any(f"({term})" in one.message for one in found), f"{pattern!r} does not match {wrong!r}"
    assert {(one.path, one.line) for one in found} == {("page.md", 3)}
    assert language.word_findings("page.md", right) == []


def test_every_word_has_a_sentence():
    """The examples are as many as the patterns."""
    assert len(SENTENCES) == len(language.BANNED)


@pytest.mark.parametrize(
    "wrong",
    [
        '"""What a module is for."""',
        'def f():\n    """Which of two."""',
        'class A:\n    """\n    Whether it holds."""',
        'async def f():\n    """how wide it is."""',
        'class A:\n    def f(self):\n        """Of every point, its pixel."""',
    ],
)
def test_first_words_are_rejected(wrong):
    """Question words and "of" are found in every kind of docstring, with the line of the docstring."""
    line = 1 + wrong[: wrong.index('"""')].count("\n")
    assert [found.line for found in language.docstring_findings("a.py", wrong)] == [line]
    assert str(language.docstring_findings("a.py", wrong)[0]).startswith(f"a.py:{line}: docstring starts with")


@pytest.mark.parametrize(
    "right",
    [
        '"""Registry of backends."""',
        'def f():\n    """Return the points."""',
        "# What follows is a comment.",
        'def f():\n    text = "What is printed?"',
        'def f():\n    """Offset of a point: how far it moves."""',
        "def f():\n    return 1",
    ],
)
def test_first_words_are_accepted(right):
    """Noun phrases and imperatives pass; a question word elsewhere passes too."""
    assert language.docstring_findings("a.py", right) == []


@pytest.mark.parametrize(
    ("path", "source", "lines"),
    [
        ("tests/a.py", "# beside\n", [1]),
        ("tests/a.py", "x = 1\n# it goes on\n# with the next step\n", [2]),
        ("tests/a.py", "x = 1  # beside\ny = 2  # the next\n", [1]),
        ("tests/a.py", 'def f():\n    """Sum.\n\n    It is beside the map.\n    """\n', [4]),
        ("tests/a.py", 'raise ValueError("beside the map")\n', []),
        ("dat_ref/a.py", 'raise ValueError("beside the map")\n', [1]),
        ("dat_ref/a.py", 'raise ValueError(\n    f"{name} is "\n    "beside the map"\n)\n', [3]),
        ("dat_ref/a.py", 'RENAMED = {"cut_windows": "window_partition"}\n', []),
        ("dat_ref/a.py", "beside = 1\n", []),
        ("dat_ref/a.py", "# the flag `beside`, ``anew`` and `twin`\n", []),
        ("dat_ref/a.py", '"""Sum.\n\n>>> beside = 1\n>>> beside\n1\n"""\n', []),
        ("docs/a.md", "```python\nbeside = 1\n```\nThe map beside it.\n", [4]),
        ("docs/a.md", "    ~~~\n    beside\n    ~~~\n", []),
        ("docs/a.md", "[a link](beside.md) and <img alt=beside>\n", []),
        ("docs/a.md", "\\(beside\\) and $$beside$$\n", []),
        ("docs/a.md", "Besides, non-dear and dear_me are other words.\n", []),
    ],
)
def test_prose_and_code(path, source, lines):
    """Comments, docstrings, the package's literals and pages are prose; names, snippets, formulas and links are not."""
    assert [found.line for found in language.check_file(path, source)] == lines


def test_an_allowed_line_passes():
    """An exception names the file and the line; the same words in another file are found."""
    allowed = frozenset({("docs/a.md", "The twin paradox.")})
    assert language.word_findings("docs/a.md", "  The twin paradox.\n", allowed) == []
    assert len(language.word_findings("docs/b.md", "  The twin paradox.\n", allowed)) == 1


def test_a_tree_is_searched(tmp_path):
    """All folders are searched; the lint itself and files of other kinds are not."""
    for name in ("dat_ref/a.py", "dat_ref/b/c.py", "docs/a.md", "docs/b/c.md", "tests/a.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# beside\n", encoding="utf-8")
    for name in (*language.SKIPPED, "docs/a.css", "elsewhere.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# beside\n", encoding="utf-8")
    assert [found.path for found in language.check_tree(tmp_path)] == [
        "README.md", "dat_ref/a.py", "dat_ref/b/c.py", "docs/a.md", "docs/b/c.md", "tests/a.py",
    ]  # fmt: skip


def test_the_exit_code(tmp_path, monkeypatch, capsys):
    """The script prints ``file:line: message`` and a count and returns 1; for a clean tree it prints nothing."""
    monkeypatch.setattr(language, "ROOT", tmp_path)
    assert language.main() == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "README.md").write_text("# Title\n\nA window anew.\n", encoding="utf-8")
    assert language.main() == 1
    first, count = capsys.readouterr().out.splitlines()
    assert first.startswith("README.md:3: 'anew'")
    assert count == "1 findings in 1 files"


def test_the_repository_is_clean():
    """No file of the repository has a finding."""
    found = language.check_tree(language.ROOT)
    assert not found, "\n".join(map(str, found))


def test_every_exception_is_used():
    """Each entry of `language.ALLOWED` names a line that exists."""
    for path, line in language.ALLOWED:
        assert line in [one.strip() for one in (language.ROOT / path).read_text(encoding="utf-8").splitlines()]
