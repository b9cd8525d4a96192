"""``dat-ref claims``: run the ledger's checks and compare what they find with the verdicts on record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..claims import LEDGER, Claim, Finding, markdown, table
from ..claims import run as run_claim


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "claims",
        help="check what the articles say, claim by claim",
        description="Run the check of every claim in the ledger and print its verdict and why. Exits with 1 when a "
        "verdict is no longer the one on record.",
    )
    parser.add_argument(
        "--only", type=int, action="append", metavar="N", help="number of a claim to run; repeatable (default: all)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--markdown", action="store_true", help="print the page of the site")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if a verdict is no longer the one on record."""
    findings = [run_claim(claim) for claim in select_claims(LEDGER, options.only)]
    if options.json:
        print(json.dumps([to_json(finding) for finding in findings], indent=2, ensure_ascii=False))
    elif options.markdown:
        print(markdown(findings), end="")
    else:
        print(table(findings))
    return int(not all(finding.matches for finding in findings))


def select_claims(ledger: Sequence[Claim], numbers: Sequence[int] | None) -> list[Claim]:
    """Return the claims with these numbers, in the ledger's order; all of them for None.

    Raises:
        ValueError: for a number that no claim has.
    """
    if numbers is None:
        return list(ledger)
    known = [claim.number for claim in ledger]
    missing = [number for number in numbers if number not in known]
    if missing:
        raise ValueError(f"--only: expected numbers of claims, {min(known)} to {max(known)}, got {missing[0]}")
    return [claim for claim in ledger if claim.number in numbers]


def to_json(finding: Finding) -> dict[str, Any]:
    """Return a finding as JSON can say it."""
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
