"""Text forms of the ledger: a table for the terminal, and a page of the site."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .claim import Finding, Outcome

WIDTH = 100

INTRODUCTION = """\
# Claims, checked

Statements of the two articles about deformable attention. Each has a check that anyone can run:

    dat-ref claims              # all of them
    dat-ref claims --only 6     # one

The checks count and compute on the NumPy spec; none measures time. A rule in the code derives the verdict from the
figures. The command fails if the result differs from the recorded verdict. There are four verdicts:

- **holds**: the figures agree with the claim.
- **holds if** a stated condition is met.
- **refuted by arithmetic**: the source's numbers contradict each other.
- **not testable here**, with the reason.

A refuted detail is no judgment of the whole work. Most of these claims hold, and the one wrong decimal point makes the
method look more expensive than it is. The articles' sentences are paraphrased. If a sentence could not be read in the
article itself, the source states how it is known.
"""


def summary(findings: Sequence[Finding]) -> str:
    """Return one line with the number of claims for each verdict, and the claims that differ from the record."""
    counts = [
        f"{sum(finding.verdict.outcome is outcome for finding in findings)} {label}"
        for outcome, label in (
            (Outcome.HOLDS, "hold"),
            (Outcome.CONDITIONAL, "hold under a condition"),
            (Outcome.REFUTED, "refuted by arithmetic"),
            (Outcome.UNTESTABLE, "not testable here"),
        )
    ]
    wrong = [str(finding.claim.number) for finding in findings if not finding.matches]
    agreement = f"no longer as recorded: {', '.join(wrong)}" if wrong else "every verdict is as recorded"
    return f"{len(findings)} claims: {', '.join(counts)}; {agreement}."


def table(findings: Sequence[Finding]) -> str:
    """Return the ledger for a terminal: number, title, verdict and explanation."""
    lines: list[str] = []
    for finding in findings:
        claim = finding.claim
        lines.append(f"{claim.number:>3}  {claim.title}")
        if not finding.matches:
            lines += _indent(f"MISMATCH: recorded: {claim.verdict}; found: {finding.verdict}")
        else:
            lines += _indent(f"{finding.verdict}")
        lines += _indent(finding.explanation)
        lines.append("")
    return "\n".join([*lines, summary(findings)])


def _indent(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 5, subsequent_indent=" " * 5)


def anchor(number: int) -> str:
    """Return the link target of a claim."""
    return f"claim-{number}"


def markdown(findings: Sequence[Finding]) -> str:
    """Return the page: an overview with links, then each claim with its source, verdict and figures."""
    overview = ["| | claim | verdict |", "|--:|---|---|"]
    overview += [
        f"| {finding.claim.number} | [{finding.claim.title}](#{anchor(finding.claim.number)}) | {finding.verdict} |"
        for finding in findings
    ]
    note = "<!-- Written by `dat-ref claims --markdown`; edit dat_ref/claims and run it again. -->\n"
    return "\n".join([note + INTRODUCTION, *overview, "", summary(findings), "", *map(_section, findings)])


def _section(finding: Finding) -> str:
    claim = finding.claim
    sources = "; ".join(map(str, claim.sources))
    figures = [f"| {_cell(figure.label)} | {_cell(str(figure))} |" for figure in finding.figures.values()]
    return "\n".join(
        [
            f"## {claim.number}. {claim.title} {{#{anchor(claim.number)}}}",
            "",
            f"> {claim.statement}",
            "",
            f"Source: {sources}.",
            "",
            f"**{_capital(str(finding.verdict))}.** {finding.explanation}",
            "",
            "| found | |",
            "|---|--:|",
            *figures,
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
