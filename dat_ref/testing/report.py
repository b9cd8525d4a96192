"""The report for people: a table of checks, the mistake by name, and each counter-example with what it means."""

from __future__ import annotations

import textwrap

import numpy as np

from .drawing import worst
from .run import Report, Result
from .snippet import snippet
from .subject import Case, Mismatch, Stage
from .trial import Trial

MARKS = {"pass": "✓", "fail": "✗", "skip": "·", "xfail": "✗", "xpass": "✓"}
WIDTH = 84
SINGLE_PRECISION = 8 * float(np.finfo(np.float32).eps)


def text(report: Report) -> str:
    """Return the report as text."""
    parts = [_head(report), table(report)]
    if report.diagnosis:
        parts.append(diagnosis(report))
    if _as_in_single_precision(report):
        parts.append(
            "Where its numbers are wrong they are nearly right, as in single precision: check it with --dtype float32."
        )
    failed = [result for result in report.results if result.status == "fail"]
    for stage in Stage:
        of_stage = [result for result in failed if result.check.stage is stage]
        if of_stage:
            parts += [failure_text(report.trial, result) for result in of_stage if result in report.shown()]
            others = [result.check.name for result in of_stage if result not in report.shown()]
            if others:
                parts.append(_wrapped(f"Also fails, perhaps for the same reason: {', '.join(others)}."))
    parts.append(_verdict(report))
    return "\n\n".join(parts)


def _head(report: Report) -> str:
    trial, setting = report.trial, report.trial.setting
    convention = f", convention {setting.convention.name}" if trial.subject.conventional else ""
    return (
        f"{trial.implementation.name} as {trial.subject.name}: {trial.subject.title}\n"
        f"{trial.subject.signature}, {setting.dtype}{convention}, {setting.max_examples} drawn cases a check"
    )


def table(report: Report) -> str:
    """Return one line a check: stage, mark, name and promise, or why it did not run."""
    lines, stage = [], None
    longest = max(len(result.check.name) for result in report.results)
    for result in report.results:
        shown = result.check.stage.value if result.check.stage is not stage else ""
        stage = result.check.stage
        note = {
            "skip": f"not run: {result.skipped}",
            "xfail": f"fails as expected: {result.expected_failure}",
            "xpass": "holds, but is on the list of expected failures: take it off",
        }.get(result.status, result.check.promise)
        if result.left_out:
            note += f" (on some cases not run: {result.left_out})"
        lines.append(f"  {shown:<11}{MARKS[result.status]} {result.check.name:<{longest}}  {note}")
    return "\n".join(lines)


def diagnosis(report: Report) -> str:
    """Say which known mistake the implementation behaves like."""
    names = report.diagnosis
    count = "one mistake" if len(names) == 1 else f"{len(names)} mistakes"
    listed = "\n".join(f"    {name}" for name in names)
    return f"It behaves exactly like the reference with {count}:\n{listed}"


def _as_in_single_precision(report: Report) -> bool:
    """Whether float64 was handed over, and every number that differs does so by a few roundings of float32."""
    pairs = [
        (result.failure.mismatch.got, result.failure.mismatch.expected) for result in report.failed() if result.failure
    ]
    numbers = [(got, expected) for got, expected in pairs if got is not None and expected is not None]
    near = [
        got.shape == expected.shape and np.allclose(got, expected, rtol=SINGLE_PRECISION, atol=SINGLE_PRECISION)
        for got, expected in numbers
    ]
    return report.trial.setting.dtype == "float64" and bool(near) and all(near)


def failure_text(trial: Trial, result: Result) -> str:
    """Return what failed: the promise, what it means, the counter-example as a drawing and as a program."""
    failure, check = result.failure, result.check
    assert failure is not None
    mismatch = failure.mismatch
    lines = [
        f"✗ {check.name}",
        _wrapped(f"promised: {check.promise}", "  "),
        _wrapped(f"failing means: {check.meaning}", "  "),
        "",
    ]
    named = f" ({failure.case.name})" if failure.case.name else ""
    lines.append(f"  smallest counter-example{named}: {mismatch.words}")
    with np.errstate(all="ignore"):
        lines.append(textwrap.indent(_drawn(trial, failure.case, mismatch), "    "))
    if mismatch.expected is not None and mismatch.got is not None:
        lines.append("    " + worst(mismatch.expected, mismatch.got))
    lines += ["", "  to reproduce:"]
    lines.append(textwrap.indent(snippet(trial, failure.case, mismatch, check.stage), "    "))
    return "\n".join(lines)


def _drawn(trial: Trial, case: Case, mismatch: Mismatch) -> str:
    convention = [trial.setting.convention] if trial.subject.conventional else []
    return trial.subject.draw(case, mismatch, *convention)


def _wrapped(words: str, indent: str = "") -> str:
    return textwrap.fill(words, WIDTH, initial_indent=indent, subsequent_indent=indent + "  " * bool(indent))


def _verdict(report: Report) -> str:
    counts = {status: sum(result.status == status for result in report.results) for status in MARKS}
    parts = [f"{counts['pass']} of {len(report.results)} checks hold"]
    for status, words in (("fail", "fail"), ("xfail", "fail as expected"), ("xpass", "hold unexpectedly")):
        parts += [f"{counts[status]} {words}"] * bool(counts[status])
    parts += [f"{counts['skip']} not run"] * bool(counts["skip"])
    return ", ".join(parts)
