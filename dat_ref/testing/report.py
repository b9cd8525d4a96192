"""Text report: a table of checks, the diagnosis, and the counter-examples."""

from __future__ import annotations

import textwrap

import numpy as np

from .context import CheckContext
from .drawing import describe_largest_error
from .op_spec import Case, Mismatch, Stage
from .run import Report, Result
from .snippet import snippet

SYMBOLS = {"pass": "✓", "fail": "✗", "skip": "·", "xfail": "✗", "xpass": "✓"}
WIDTH = 84
SINGLE_PRECISION = 8 * float(np.finfo(np.float32).eps)


def format_report(report: Report) -> str:
    """Return the report as text."""
    parts = [_header(report), checks_table(report)]
    if report.diagnosis:
        parts.append(format_diagnosis(report))
    if _looks_single_precision(report):
        parts.append(
            "All differences are as small as rounding errors of single precision: check it with --dtype float32."
        )
    failed = [result for result in report.results if result.status == "fail"]
    for stage in Stage:
        stage_failures = [result for result in failed if result.check.stage is stage]
        if stage_failures:
            parts += [
                format_failure(report.context, result)
                for result in stage_failures
                if result in report.detailed_failures()
            ]
            others = [result.check.name for result in stage_failures if result not in report.detailed_failures()]
            if others:
                parts.append(_wrap(f"Also failing, perhaps for the same reason: {', '.join(others)}."))
    parts.append(_summary(report))
    return "\n\n".join(parts)


def _header(report: Report) -> str:
    ctx, setting = report.context, report.context.setting
    convention = f", convention {setting.convention.name}" if ctx.op.depends_on_convention else ""
    return (
        f"{ctx.implementation.name} as {ctx.op.name}: {ctx.op.title}\n"
        f"{ctx.op.signature}, {setting.dtype}{convention}, {setting.max_examples} random cases per check"
    )


def checks_table(report: Report) -> str:
    """Return one line per check: stage, symbol, name, and the property or the reason why it did not run."""
    lines, stage = [], None
    longest = max(len(result.check.name) for result in report.results)
    for result in report.results:
        stage_label = result.check.stage.value if result.check.stage is not stage else ""
        stage = result.check.stage
        note = {
            "skip": f"not run: {result.skipped}",
            "xfail": f"fails as expected: {result.expected_failure}",
            "xpass": "holds, but is listed as an expected failure: remove it from the list",
        }.get(result.status, result.check.property)
        if result.skipped_cases:
            note += f" (not run on some cases: {result.skipped_cases})"
        lines.append(f"  {stage_label:<11}{SYMBOLS[result.status]} {result.check.name:<{longest}}  {note}")
    return "\n".join(lines)


def format_diagnosis(report: Report) -> str:
    """Return the known mistakes that explain the results."""
    names = report.diagnosis
    count = "one mistake" if len(names) == 1 else f"{len(names)} mistakes"
    listed = "\n".join(f"    {name}" for name in names)
    return f"It behaves exactly like the reference with {count}:\n{listed}"


def _looks_single_precision(report: Report) -> bool:
    """Return whether the setting is float64 and all differences are a few roundings of float32."""
    pairs = [
        (result.failure.mismatch.got, result.failure.mismatch.expected) for result in report.failed() if result.failure
    ]
    comparable = [(got, expected) for got, expected in pairs if got is not None and expected is not None]
    close = [
        got.shape == expected.shape and np.allclose(got, expected, rtol=SINGLE_PRECISION, atol=SINGLE_PRECISION)
        for got, expected in comparable
    ]
    return report.context.setting.dtype == "float64" and bool(close) and all(close)


def format_failure(ctx: CheckContext, result: Result) -> str:
    """Return the report of a failed check: property, likely cause, and the counter-example as drawing and program."""
    failure, check = result.failure, result.check
    assert failure is not None
    mismatch = failure.mismatch
    lines = [
        f"✗ {check.name}",
        _wrap(f"property: {check.property}", "  "),
        _wrap(f"likely cause: {check.explanation}", "  "),
        "",
    ]
    case_name = f" ({failure.case.name})" if failure.case.name else ""
    lines.append(f"  smallest counter-example{case_name}: {mismatch.message}")
    with np.errstate(all="ignore"):
        lines.append(textwrap.indent(_draw_case(ctx, failure.case, mismatch), "    "))
    if mismatch.expected is not None and mismatch.got is not None:
        lines.append("    " + describe_largest_error(mismatch.expected, mismatch.got))
    lines += ["", "  to reproduce:"]
    lines.append(textwrap.indent(snippet(ctx, failure.case, mismatch, check.stage), "    "))
    return "\n".join(lines)


def _draw_case(ctx: CheckContext, case: Case, mismatch: Mismatch) -> str:
    convention = [ctx.setting.convention] if ctx.op.depends_on_convention else []
    return ctx.op.draw(case, mismatch, *convention)


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  " * bool(indent))


def _summary(report: Report) -> str:
    counts = {status: sum(result.status == status for result in report.results) for status in SYMBOLS}
    parts = [f"{counts['pass']} of {len(report.results)} checks hold"]
    for status, label in (("fail", "fail"), ("xfail", "fail as expected"), ("xpass", "hold unexpectedly")):
        parts += [f"{counts[status]} {label}"] * bool(counts[status])
    parts += [f"{counts['skip']} not run"] * bool(counts["skip"])
    return ", ".join(parts)
