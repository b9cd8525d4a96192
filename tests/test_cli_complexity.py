"""`dat-ref complexity`: a table with correct sums, exact integers in JSON, curves, and error messages."""

import argparse
import json

import pytest
from PIL import Image

import dat_ref
from dat_ref.cli import complexity
from dat_ref.complexity import backbone_cost
from dat_ref.peers import REPLACEMENTS, replace_attention
from dat_ref.viz import cost as viz_cost


def run(capsys, *arguments):
    """Run the command in this process; return its exit code and output."""
    parser = argparse.ArgumentParser()
    complexity.add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["complexity", *map(str, arguments)])
    code = options.run(options)
    return code, capsys.readouterr().out


def numbers(line):
    """Return the numbers in a row of the table; a dot is zero."""
    cells = line.replace(",", "").replace(" MB", "").replace(" M", "").split()
    return [0.0 if cell == "·" else float(cell) for cell in cells if cell == "·" or cell.replace(".", "").isdigit()]


def test_table_has_the_published_numbers(capsys, tmp_path):
    """Default: dat_tiny at 224². Totals as published, equal blocks of a stage in one row, the figure last."""
    code, printed = run(capsys, "--out", tmp_path / "figures")
    lines = printed.strip().splitlines()
    assert code == 0
    assert lines[0] == "dat_tiny on one image of 224×224, float32"
    assert "28.32 M parameters, 4.563 G multiply-adds (published: 29 M, 4.6 G)" in lines
    assert sum(line.startswith("  deformable") for line in lines) == 2
    assert any(line.startswith("  window ×3") for line in lines)
    assert lines[-1] == str(tmp_path / "figures" / "dat_tiny_growth.png")
    with Image.open(lines[-1]) as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 600


def test_terms_of_the_table_add_up(capsys, tmp_path):
    """The rows by term sum to the last row, up to the printed digits."""
    _, printed = run(capsys, "--model", "dat_pp_tiny", "--size", 96, "--out", tmp_path)
    lines = printed.splitlines()
    start, stop = (
        next(i for i, line in enumerate(lines) if line.startswith(name)) for name in ("all, by term", "all  ")
    )
    terms = [numbers(line) for line in lines[start + 1 : stop]]
    parameters, macs, interpolated, gathers, kept, _ = numbers(lines[stop])
    for column, amount in enumerate((parameters, macs, interpolated, gathers, kept)):
        assert sum(term[column] for term in terms) == pytest.approx(amount, abs=0.01 * len(terms))


def test_json_is_exact(capsys, tmp_path):
    """`--json` prints one JSON document with the integers of parts, terms and curves, and the path of the figure."""
    code, printed = run(capsys, "--json", "--size", "64x96", "--out", tmp_path)
    facts = json.loads(printed)
    cost = backbone_cost(1, (64, 96), dat_ref.config("dat_tiny"))
    assert code == 0
    assert facts["image_size"] == [64, 96]
    assert facts["published"] is None  # the published numbers are for another size
    assert facts["total"]["macs"] == cost.total.macs == sum(term["macs"] for term in facts["terms"].values())
    assert facts["total"]["products"] == cost.total.products
    assert len(facts["parts"]) == len(cost.parts) == 12 + 1 + 3 + 1
    assert {curve["kind"] for curve in facts["curves"]} >= {"deformable", "deformable_fixed", "multi_head", "per_query"}
    assert facts["figures"] == [str(tmp_path / "dat_tiny_growth.png")]


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_any_peer_can_replace_deformable_attention(capsys, tmp_path, kind):
    code, printed = run(capsys, "--json", "--attention", kind, "--size", "64", "--out", tmp_path)
    facts = json.loads(printed)
    cost = backbone_cost(1, (64, 64), replace_attention(dat_ref.config("dat_tiny"), kind))
    assert code == 0
    assert facts["attention"] == kind
    assert facts["total"]["macs"] == cost.total.macs
    assert "deformable" not in {part["kind"] for part in facts["parts"]}


def test_size_too_small_says_so(capsys, tmp_path):
    with pytest.raises(dat_ref.ConfigError, match="--size: expected at least 32 pixels on each side, got 16×64"):
        run(capsys, "--size", "16x64", "--out", tmp_path)


@pytest.mark.parametrize("arguments", [["--attention", "linear"], ["--model", "dat_huge"], ["--size", "large"]])
def test_unknown_names_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(capsys, *arguments)
    assert stop.value.code == 2


# ------------------------------------------------------------------------------------------------ the figure


class Line:
    """A curve with only the attributes that the figure needs."""

    def __init__(self, kind, exponent, sides=(7, 14, 28)):
        self.kind, self.sides = kind, sides
        self.macs = self.saved_bytes = tuple(1000 * side**exponent for side in sides)


def test_figure_names_every_line_with_its_exponent():
    figure = viz_cost.draw_cost([Line("multi_head", 4), Line("window", 2), Line("of_tomorrow", 3)], reduction=16)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Multiply-adds", "Memory for the backward pass"]
    for axes in figure.axes:
        texts = [text.get_text().strip() for text in axes.texts]
        assert texts == ["window", "2.0", "of tomorrow", "3.0", "multi-head", "4.0"]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xlim()[0] < 7 * 16 < 28 * 16 < axes.get_xlim()[1]


def test_names_never_touch():
    same = [Line(f"kind {index}", 2) for index in range(9)]
    figure = viz_cost.draw_cost(same, reduction=16)
    axes = figure.axes[0]
    height = axes.get_position().height * figure.get_size_inches()[1]
    places = sorted(text.xy[1] * height for text in axes.texts[::2])
    assert min(after - before for before, after in zip(places, places[1:])) > 0.99 * viz_cost.LABEL_PITCH


@pytest.mark.parametrize("lines", [[], [Line("window", 2), Line("pyramid", 4, (7, 14))]])
def test_figure_refuses_curves_that_do_not_go_together(lines):
    with pytest.raises(ValueError, match="curves: expected at least one"):
        viz_cost.draw_cost(lines, reduction=16)


@pytest.mark.parametrize(
    ("amount", "unit", "written"),
    [(1.0, "B", "1 B"), (1000, "B", "1 kB"), (2e6, "", "2 M"), (1e11, "", "100 G"), (0, "B", "0"), (10, "", "10")],
)
def test_numbers_are_written_with_prefixes(amount, unit, written):
    assert viz_cost._format_amount(amount, unit) == written
