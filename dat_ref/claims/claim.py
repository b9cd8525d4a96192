"""What a claim is: a source's words, a check that counts or computes, and a verdict that follows from the figures.

A claim has two functions. `measure` runs the spec and returns figures; `judge` turns figures into a verdict and
does nothing else. The ledger also records a verdict: `run` finds one anew, and whoever reads the ledger can see
whether the two are still the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

Value = int | float | str | bool


class Outcome(Enum):
    """The four things that can be said of a claim."""

    HOLDS = "holds"
    CONDITIONAL = "holds if"
    REFUTED = "refuted by arithmetic"
    UNTESTABLE = "not testable here"


@dataclass(frozen=True)
class Verdict:
    """An outcome, with the condition under which a claim holds or the reason why it cannot be tested."""

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
    """Return the verdict that a claim holds under a condition."""
    return Verdict(Outcome.CONDITIONAL, condition)


def not_testable(reason: str) -> Verdict:
    """Return the verdict that a claim cannot be tested here."""
    return Verdict(Outcome.UNTESTABLE, reason)


@dataclass(frozen=True)
class Figure:
    """One number (or name, or yes or no) that a check found.

    >>> f"{Figure(508032, 'offset network', 'multiply-adds')}", f"{Figure(0.0064, 'its share')}"
    ('508,032', '0.0064')
    """

    value: Value
    label: str
    unit: str = ""
    digits: int = 3  # significant ones, where the value is not whole

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
    """How well a source is known to us."""

    READ = "read there"
    COPIED = "read in a facsimile"
    QUOTED = "known through notes that quote it"
    SUMMARY = "known through one summary only"


@dataclass(frozen=True)
class Source:
    """Where a claim stands, and how sure we are that it stands there."""

    location: str
    access: SourceAccess

    def __str__(self) -> str:
        return f"{self.location} ({self.access.value})"


@dataclass(frozen=True)
class Claim:
    """One row of the ledger.

    Args:
        number: its place in the ledger.
        title: a few words.
        statement: what the source says, in our words.
        sources: where it says so.
        measure: runs the spec and returns figures by key.
        judge: the verdict that follows from the figures.
        verdict: the verdict on record.
        reason: why, with ``{key}`` where a figure belongs.
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
    """What a check found."""

    claim: Claim
    verdict: Verdict
    figures: Figures

    @property
    def matches(self) -> bool:
        """Whether the verdict on record is still the one that follows from the figures."""
        return self.verdict == self.claim.verdict

    @property
    def explanation(self) -> str:
        """Why, with the figures found."""
        return self.claim.reason.format(**self.figures)


def run(claim: Claim) -> Finding:
    """Measure a claim's figures and judge them."""
    figures = claim.measure()
    return Finding(claim, claim.judge(figures), figures)
