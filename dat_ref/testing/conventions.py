"""Which convention does an implementation follow? The one whose truth it gives, or none, and then the nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..conventions import Convention
from .diagnosis import diagnose
from .subject import Case, Check, Implementation, Mismatch, Setting, Skip, Stage, Subject
from .trial import Trial

FARTHEST = 1e9


@dataclass(frozen=True)
class Following:
    """The convention found, or the nearest one with how far it is off, in words.

    Args:
        alike: other conventions under which its results would be right, too.
    """

    convention: Convention
    exact: bool
    words: str
    alike: tuple[Convention, ...] = ()

    @property
    def names(self) -> str:
        """The convention by name, with those that cannot be told from it."""
        return " = ".join(convention.name for convention in (self.convention, *self.alike))


def follows(implementation: Implementation, subject: Subject, setting: Setting | None = None) -> Following:
    """Find the convention of an implementation, from the named examples of the values stage."""
    setting = setting or Setting()
    trials = [Trial(implementation, subject, replace(setting, convention=convention)) for convention in Convention]
    found = [_distance(trial) for trial in trials]
    exact = [following for _, following in found if following.exact]
    if exact:
        return replace(exact[0], alike=tuple(following.convention for following in exact[1:]))
    # A convention from which it is one known mistake away is nearer than one that gives similar numbers.
    mistakes = [len(diagnose(trial, [case for _, case in _examples(trial)])) or FARTHEST for trial in trials]
    nearest = min(range(len(found)), key=lambda i: (mistakes[i], found[i][0]))
    return found[nearest][1]


def _examples(trial: Trial) -> Iterator[tuple[Check, Case]]:
    for check in trial.subject.checks:
        if check.stage is Stage.VALUES:
            yield from ((check, case) for case in check.cases(trial.setting))


def _distance(trial: Trial) -> tuple[float, Following]:
    """Return (the mean error over the examples, what is to be said)."""
    pairs = [(case, _mismatch(trial, check, case)) for check, case in _examples(trial)]
    errors = [0.0 if mismatch is None else _error(mismatch) for _, mismatch in pairs]
    exact = all(mismatch is None for _, mismatch in pairs)
    return float(np.mean(errors)), Following(trial.setting.convention, exact, _words(trial.subject, pairs))


def _mismatch(trial: Trial, check: Check, case: Case) -> Mismatch | None:
    try:
        check.test(trial, case)
    except Mismatch as mismatch:
        return mismatch
    except Skip:
        pass
    return None


def _error(mismatch: Mismatch) -> float:
    """Return the largest error; a wrong shape, NaN or an exception is further than any number."""
    if mismatch.got is None or mismatch.expected is None or mismatch.got.shape != mismatch.expected.shape:
        return FARTHEST
    return float(np.nan_to_num(np.abs(mismatch.got - mismatch.expected), nan=FARTHEST).max())


def _words(subject: Subject, pairs: Sequence[tuple[Case, Mismatch | None]]) -> str:
    """Say how far it is off, on the example where that is farthest."""
    measured = [(case, each) for case, each in pairs if each is not None and _error(each) < FARTHEST]
    if not measured:
        return "it gives no numbers to compare"
    case, worst = max(measured, key=lambda pair: _error(pair[1]))
    assert worst.expected is not None
    assert worst.got is not None
    if subject.distance is not None:
        return subject.distance(case, worst.expected, worst.got)
    return f"differs by up to {_error(worst):.3g}"
