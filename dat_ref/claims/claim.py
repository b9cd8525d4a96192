"""Claim: a statement of a source, a check that counts or computes, and a verdict that follows from the figures.

A claim has two functions. `measure` runs the spec and returns figures. `judge` derives a verdict from the figures
alone. The ledger also records a verdict; `run` derives it again, so that a difference is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

Value = int | float | str | bool


class Outcome(Enum):
    """Kind of verdict."""

    HOLDS = "holds"
    CONDITIONAL = "holds if"
    REFUTED = "refuted by arithmetic"
    UNTESTABLE = "not testable here"


@dataclass(frozen=True)
class Verdict:
    """Outcome, with the condition under which the claim holds or the reason why it cannot be tested."""

    outcome: Outcome
    condition: str = ""

    def __str__(self) -> str:
        if not self.condition:
            return self.outcome.value
        conjunction = ", because " if self.outcome is Outcome.UNTESTABLE else " "
        return f"{self.outcome.value}{conjunction}{self.condition}"


HOLDS = Verdict(Outcome.HOLDS)
REFUTED = Verdict(Outcome.REFUTED)


def holds_if(condition: str) -> Verdict:
    """Return the verdict for a claim that holds under a condition."""
    return Verdict(Outcome.CONDITIONAL, condition)


def not_testable(reason: str) -> Verdict:
    """Return the verdict for a claim that cannot be tested here."""
    return Verdict(Outcome.UNTESTABLE, reason)


@dataclass(frozen=True)
class Figure:
    """Result of a check: a number, a name, or yes or no.

    >>> f"{Figure(508032, 'offset network', 'multiply-adds')}", f"{Figure(0.0064, 'its share')}"
    ('508,032', '0.0064')
    """

    value: Value
    label: str
    unit: str = ""
    digits: int = 3  # significant digits of a value that is not an integer

    def __format__(self, spec: str) -> str:
        if spec:
            return format(self.value, spec)
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        if isinstance(self.value, int):
            return f"{self.value:,}"
        if isinstance(self.value, float):
            return f"{self.value:.{self.digits}g}"
        return self.value

    def __str__(self) -> str:
        return f"{format(self)} {self.unit}".rstrip()


Figures = Mapping[str, Figure]


class SourceAccess(Enum):
    """Way in which the statement of a source is known to this project."""

    READ = "read there"
    COPIED = "read in a facsimile"
    QUOTED = "known through notes that quote it"
    SUMMARY = "known through one summary only"


@dataclass(frozen=True)
class Source:
    """Place of a claim in the literature, and how it is known."""

    location: str
    access: SourceAccess

    def __str__(self) -> str:
        return f"{self.location} ({self.access.value})"


@dataclass(frozen=True)
class Claim:
    """Row of the ledger.

    Args:
        number: number in the ledger.
        title: short title.
        statement: statement of the source, in our words.
        sources: sources of the statement.
        measure: function that runs the spec and returns figures by key.
        judge: function that derives the verdict from the figures.
        verdict: recorded verdict.
        reason: explanation of the verdict, with ``{key}`` as a placeholder for a figure.
    """

    number: int
    title: str
    statement: str
    sources: tuple[Source, ...]
    measure: Callable[[], Figures]
    judge: Callable[[Figures], Verdict]
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Finding:
    """Result of running a claim's check."""

    claim: Claim
    verdict: Verdict
    figures: Figures

    @property
    def matches(self) -> bool:
        """True if the recorded verdict equals the verdict that follows from the figures."""
        return self.verdict == self.claim.verdict

    @property
    def explanation(self) -> str:
        """Explanation of the verdict, with the measured figures."""
        return self.claim.reason.format(**self.figures)


def run(claim: Claim) -> Finding:
    """Measure the figures of a claim and derive the verdict."""
    figures = claim.measure()
    return Finding(claim, claim.judge(figures), figures)
