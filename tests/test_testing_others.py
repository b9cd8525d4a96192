"""Statements of the site about other packages equal the results of the kit, for installed packages of that version."""

import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest

from dat_ref.testing import Setting, Stage, check, format_report
from dat_ref.testing.op_spec import apply_mutants
from dat_ref.testing.ops import MULTI_SCALE

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
WRITTEN = json.loads((FIGURES / "others.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def others():
    """Return the script that generates the page."""
    spec = importlib.util.spec_from_file_location("docs_others", FIGURES / "others.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", range(len(WRITTEN)), ids=lambda number: "{target}-{op}".format(**WRITTEN[number]))
def test_statements_about_packages_equal_the_results(number, others):
    """A few cases per check are enough to reproduce every failure."""
    written, row = WRITTEN[number], others.ROWS[number]
    try:
        installed = version(row.package)
    except PackageNotFoundError:
        pytest.skip(f"{row.package} is not installed")
    if installed != written["version"]:
        pytest.skip(f"{row.package} {installed} is installed, {written['version']} was checked")
    assert others.outcome(row, others.measure(row, max_examples=3, shrink=False)) == written


def test_the_page_equals_the_results():
    """The table of the page equals the results in its JSON file."""
    page = (FIGURES / "others.md").read_text(encoding="utf-8")
    for each in WRITTEN:
        statuses = list(each["statuses"].values())
        held, failed = statuses.count("pass"), statuses.count("fail")
        assert f"| {each['version']} | {each['dtype']} |" in page
        assert f"| {held} of {held + failed} |" in page


def test_deformable_attention_with_its_two_mistakes_corrected(monkeypatch):
    """With axes divided by their own lengths and ±1 as edges, only the check of the empty batch fails."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("deformable_attention")
    from dat_ref.testing.adapters import deformable_attention as adapter

    def normalize_grid(grid, dim=1, out_dim=-1):
        height, width = grid.shape[-2:]
        x, y = grid.unbind(dim=dim)
        return torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=out_dim)

    monkeypatch.setattr(adapter.module, "normalize_grid", normalize_grid)
    (report,) = check(adapter, ["sampler"], max_examples=3)
    assert [result.check.name for result in report.failed()] == ["shapes"], format_report(report)
    assert report.diagnosis == []


def test_discrete_sampling_of_rt_detr_v2_is_the_reference_with_three_differences():
    """The differences are, in this order: nearest pixel, repeated border, a shift by half a pixel down and right."""
    pytest.importorskip("transformers")
    from dat_ref.testing.adapters.transformers import rt_detr_v2_discrete

    names = (
        "nearest neighbor instead of bilinear interpolation",
        "the border is replicated outside the map",
        "positions are shifted by half a pixel down and right: pixel = location · W",
    )
    known = {mutant.name: mutant for mutant in MULTI_SCALE.mutants}
    wrong = apply_mutants(MULTI_SCALE.reference, [known[name] for name in names])
    for each in MULTI_SCALE.checks:
        for case in each.cases(Setting()) if each.stage is Stage.VALUES else ():
            arguments = case.arguments.values()
            np.testing.assert_allclose(
                rt_detr_v2_discrete.multi_scale_deformable_attention(*arguments), wrong.forward(*arguments), atol=1e-12
            )
