"""Run the conformance kit on other packages and record its results.

    python docs/figures/others.py

writes `others.json` and `others.md` into this folder, with versions and the date. A test runs the kit again on each
package that is installed in the recorded version, and compares.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dat_ref.testing import Report, Setting, check_op, find_ops
from dat_ref.testing.convention_match import infer_convention
from dat_ref.testing.report import format_failure

FOLDER = Path(__file__).parent
ADAPTERS = "dat_ref.testing.adapters"
MAX_NAMED_CHECKS = 4  # number of checks named in a row of the table


class Row(NamedTuple):
    """Function to check and its precision; `examples` names the counter-examples that go on the page."""

    title: str
    package: str
    target: str
    op: str
    dtype: str = "float64"
    examples: tuple[str, ...] = ()


ROWS = (
    Row(
        "its sampler", "deformable-attention", "deformable_attention", "sampler",
        examples=("first_pixel", "not_square"),
    ),
    Row("its key grid", "deformable-attention", "deformable_attention", "reference_grid", examples=("not_square",)),
    Row("Deformable DETR and its relatives", "transformers", "transformers", "multi_scale"),
    Row("Mask2Former, OneFormer", "transformers", "transformers:mask2former", "multi_scale"),
    Row("RT-DETRv2, D-FINE", "transformers", "transformers:rt_detr_v2", "multi_scale"),
    Row(
        "RT-DETRv2, the variant without interpolation", "transformers", "transformers:rt_detr_v2_discrete",
        "multi_scale", examples=("pixel_centers",),
    ),
    Row("`GridSample` of the standard's evaluator", "onnx", "onnx", "sampler", "float32", ("shapes", "nan_comes_out")),
    Row("`DeformConv` of the standard's evaluator", "onnx", "onnx", "deform_conv", "float32", ("single_row",)),
)  # fmt: skip


def measure(row: Row, max_examples: int = 50, *, shrink: bool = True) -> Report:
    """Run the checks of a row under the nearest convention."""
    ((op, implementation),) = find_ops(f"{ADAPTERS}.{row.target}", [row.op])
    setting = Setting(dtype=row.dtype, max_examples=max_examples)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if op.depends_on_convention:
            setting = Setting(infer_convention(implementation, op, setting).convention, row.dtype, max_examples)
        return check_op(implementation, op, setting, shrink=shrink)


def outcome(row: Row, report: Report) -> dict[str, Any]:
    """Return the recorded part of a report."""
    return {
        "package": row.package,
        "version": version(row.package),
        "target": f"{ADAPTERS}.{row.target}",
        "op": row.op,
        "dtype": row.dtype,
        "convention": report.context.setting.convention.name if report.context.op.depends_on_convention else None,
        "statuses": {result.check.name: result.status for result in report.results},
        "diagnosis": report.diagnosis,
    }


# ------------------------------------------------------------------------------------------------ the page's parts


def page_part(name: str, *lines: str) -> str:
    """Return a part of the file, which a page includes by name."""
    name = re.sub(r"\W+", "-", name)
    return "\n".join([f"<!-- --8<-- [start:{name}] -->", "", *lines, "", f"<!-- --8<-- [end:{name}] -->", ""])


def table(results: list[dict[str, Any]]) -> str:
    """Return a table with a row for each function: number of checks that hold, names of checks that fail."""
    lines = ["| implementation | hold | fail | version | precision | convention |", "|---|---|---|---|---|---|"]
    for row, each in zip(ROWS, results, strict=True):
        failed = [name for name, status in each["statuses"].items() if status == "fail"]
        passed = sum(status == "pass" for status in each["statuses"].values())
        ran = passed + len(failed)
        failed_text = ", ".join(f"`{name}`" for name in failed[:MAX_NAMED_CHECKS]) or "none"
        failed_text += f" and {len(failed) - MAX_NAMED_CHECKS} more" if len(failed) > MAX_NAMED_CHECKS else ""
        convention = each["convention"]
        convention_text = (
            "—" if convention is None else f"none; nearest `{convention}`" if failed else f"`{convention}`"
        )
        lines.append(
            f"| {row.package}: {row.title} | {passed} of {ran} | {failed_text} | {each['version']} | {row.dtype} "
            f"| {convention_text} |"
        )
    return "\n".join(lines)


def describe_points_outside(size: tuple[int, int]) -> str:
    """Return a sentence about deformable-attention keys outside the map, at one key per pixel and zero offsets."""
    adapter = importlib.import_module(f"{ADAPTERS}.deformable_attention")
    points = adapter.reference_pixels(size, size)
    outside_map = ((points <= -1) | (points >= np.array(size))).any(axis=-1)  # zeros are read here
    lowest = points[..., 0].max()
    return (
        f"On a map of {size[0]} × {size[1]}, without offsets, {outside_map.sum():,} of {outside_map.size:,} keys are a "
        f"pixel or more outside the map and read zeros; no key is below row {lowest:.1f}."
    )


def page_parts(results: list[dict[str, Any]], reports: list[Report]) -> str:
    """Return the Markdown that the page includes."""
    versions = sorted({f"{each['package']} {each['version']}" for each in results})
    machine = f"Python {platform.python_version()}, torch {version('torch')}, NumPy {version('numpy')}"
    sections = [
        page_part("date", f"Checked on {date.today():%d %B %Y}: {', '.join(versions)}; {machine}."),
        page_part("table", table(results)),
        page_part("outside", describe_points_outside((32, 64))),
    ]
    for row, report in zip(ROWS, reports, strict=True):
        if report.diagnosis:
            name = f"diagnosis {row.target} {row.op}"
            sections.append(page_part(name, "```text", *report.diagnosis, "```"))
        for result in report.results:
            if result.check.name in row.examples:
                assert result.failure is not None, f"{row.target}: {result.check.name} holds"
                name = f"{row.target} {row.op} {result.check.name}"
                sections.append(page_part(name, "```text", format_failure(report.context, result), "```"))
    return "\n".join(sections)


if __name__ == "__main__":
    reports = [measure(row) for row in ROWS]
    results = [outcome(row, report) for row, report in zip(ROWS, reports, strict=True)]
    (FOLDER / "others.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (FOLDER / "others.md").write_text(page_parts(results, reports), encoding="utf-8")
