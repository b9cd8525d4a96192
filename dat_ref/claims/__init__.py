"""Claims ledger: statements of the articles about deformable attention, each with a runnable check and a verdict.

    >>> from dat_ref.claims import LEDGER, run
    >>> finding = run(LEDGER[5])
    >>> finding.claim.title, str(finding.verdict)
    ('The worked example: 79.63 M, and 5.08 M for the offsets', 'refuted by arithmetic')
    >>> str(finding.figures["offset"]), finding.matches
    ('508,032 multiply-adds', True)

The checks count and compute; none measures time. ``dat-ref claims`` runs them all. It fails if a recorded verdict
differs from the verdict that follows from the figures.
"""

from .._deprecation import deprecated_names
from . import comparison, cost, coverage, equal_keys, geometry, offsets, space
from .claim import Claim, Figure, Figures, Finding, Outcome, Source, SourceAccess, Verdict, run
from .page import markdown, table

LEDGER: tuple[Claim, ...] = tuple(
    sorted(
        space.CLAIMS
        + cost.CLAIMS
        + geometry.CLAIMS
        + offsets.CLAIMS
        + comparison.CLAIMS
        + equal_keys.CLAIMS
        + coverage.CLAIMS,
        key=lambda claim: claim.number,
    )
)

__all__ = [
    "LEDGER",
    "Claim",
    "Figure",
    "Figures",
    "Finding",
    "Outcome",
    "Source",
    "SourceAccess",
    "Verdict",
    "markdown",
    "run",
    "table",
]

__getattr__ = deprecated_names(__name__, {"Sure": "SourceAccess"})
