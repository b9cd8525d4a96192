"""Text forms of the ledger: a table for the terminal, and a page of the site."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from .claim import Finding, Outcome, SourceAccess

WIDTH = 100
SURPRISE = (Outcome.REFUTED, Outcome.CONDITIONAL, Outcome.UNTESTABLE, Outcome.HOLDS)  # order of the overview

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
method look more expensive than it is. The articles' sentences are paraphrased.
"""


def provenance(findings: Sequence[Finding]) -> str:
    """Return a paragraph that counts the claims by how their statements are known."""
    sources = [finding.claim.sources for finding in findings]
    first_hand = {SourceAccess.READ, SourceAccess.COPIED}
    mixed = [{source.access for source in claim} for claim in sources]
    counts = Counter(
        "all" if accesses <= first_hand else "some" if accesses & first_hand else "none" for accesses in mixed
    )
    single = sum(accesses == {SourceAccess.SUMMARY} for accesses in mixed)
    return textwrap.fill(
        f"**Most statements were not read in the articles themselves.** For {counts['all']} of {len(findings)} claims "
        "every source was read in full (code of the releases, a facsimile of a table or figure, this project's own "
        f"pages). For {counts['some']} one source was read and another is known through notes or a summary. For "
        f"{counts['none']} all sources are known through notes that quote them or a summary, {single} of these through "
        "one summary only. Each claim states which. If you read a sentence differently, please open an issue.",
        118,
    )


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
    """Return the page: an overview with links, most surprising verdicts first; then each claim with its figures."""
    overview = ["| | claim | verdict |", "|--:|---|---|"]
    overview += [
        f"| {finding.claim.number} | [{finding.claim.title}](#{anchor(finding.claim.number)}) | {finding.verdict} |"
        for finding in sorted(findings, key=lambda finding: SURPRISE.index(finding.verdict.outcome))
    ]
    note = "<!-- Written by `dat-ref claims --markdown`; edit dat_ref/claims and run it again. -->\n"
    introduction = [note + INTRODUCTION, provenance(findings), ""]
    return "\n".join([*introduction, *overview, "", summary(findings), "", *map(_section, findings)])


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
