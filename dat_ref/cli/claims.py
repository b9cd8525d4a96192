"""``dat-ref claims``: check the papers' claims and compare the verdicts with those on record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..claims import LEDGER, Claim, Finding, markdown, table
from ..claims import run as run_claim
from .output import HelpFormatter


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "claims",
        help="check the papers' claims, one by one",
        description="Run the check of every claim in the ledger, and print the verdict and its reason. Exit code 1 if "
        "a verdict differs from the one on record.",
        epilog="example:\n  dat-ref claims --only 3 --only 7 --json",
        formatter_class=HelpFormatter,
    )
    parser.add_argument_group("selection").add_argument(
        "--only", type=int, action="append", metavar="N", help="number of a claim; repeatable (default: all claims)"
    )
    form = parser.add_argument_group("output (default: a table)").add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print the Markdown page of the documentation")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return 1 if a verdict differs from the one on record."""
    findings = [run_claim(claim) for claim in select_claims(LEDGER, options.only)]
    if options.json:
        print(json.dumps([to_json(finding) for finding in findings], indent=2))
    elif options.markdown:
        print(markdown(findings), end="")
    else:
        print(table(findings))
    return int(not all(finding.matches for finding in findings))


def select_claims(ledger: Sequence[Claim], numbers: Sequence[int] | None) -> list[Claim]:
    """Return the claims with these numbers, in the ledger's order; all claims if None.

    Raises:
        ValueError: if no claim has one of the numbers.
    """
    if numbers is None:
        return list(ledger)
    known = [claim.number for claim in ledger]
    missing = [number for number in numbers if number not in known]
    if missing:
        raise ValueError(f"--only: expected numbers of claims, {min(known)} to {max(known)}, got {missing[0]}")
    return [claim for claim in ledger if claim.number in numbers]


def to_json(finding: Finding) -> dict[str, Any]:
    """Return a finding in types that JSON supports."""
    claim = finding.claim
    return {
        "number": claim.number,
        "title": claim.title,
        "statement": claim.statement,
        "sources": [{"location": source.location, "access": source.access.value} for source in claim.sources],
        "recorded": str(claim.verdict),
        "found": str(finding.verdict),
        "matches": finding.matches,
        "explanation": finding.explanation,
        "figures": {
            key: {"label": figure.label, "value": figure.value, "unit": figure.unit}
            for key, figure in finding.figures.items()
        },
    }
