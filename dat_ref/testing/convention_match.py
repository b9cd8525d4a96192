"""Inference of the convention that an implementation follows, or of the closest one if it follows none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..conventions import Convention
from .context import CheckContext
from .diagnosis import diagnose
from .op_spec import Case, Check, Implementation, Mismatch, OpSpec, Setting, Skip, Stage

INCOMPARABLE = 1e9


@dataclass(frozen=True)
class ConventionMatch:
    """Convention that matches, or the closest one.

    Args:
        convention: the convention.
        exact: whether all results agree.
        description: the difference in words, if they do not.
        equivalent: other conventions under which the results are also correct.
    """

    convention: Convention
    exact: bool
    description: str
    equivalent: tuple[Convention, ...] = ()

    @property
    def label(self) -> str:
        """Name of the convention, and names of the equivalent ones."""
        return " = ".join(convention.name for convention in (self.convention, *self.equivalent))


def infer_convention(implementation: Implementation, op: OpSpec, setting: Setting | None = None) -> ConventionMatch:
    """Infer the convention of an implementation from the named examples of the values stage."""
    setting = setting or Setting()
    contexts = [CheckContext(implementation, op, replace(setting, convention=convention)) for convention in Convention]
    scored = [_match(ctx) for ctx in contexts]
    exact = [match for _, match in scored if match.exact]
    if exact:
        return replace(exact[0], equivalent=tuple(match.convention for match in exact[1:]))
    # A convention with one known mistake is closer than a convention with similar results.
    mistake_counts = [len(diagnose(ctx, [case for _, case in _examples(ctx)])) or INCOMPARABLE for ctx in contexts]
    nearest = min(range(len(scored)), key=lambda i: (mistake_counts[i], scored[i][0]))
    return scored[nearest][1]


def _examples(ctx: CheckContext) -> Iterator[tuple[Check, Case]]:
    for check in ctx.op.checks:
        if check.stage is Stage.VALUES:
            yield from ((check, case) for case in check.cases(ctx.setting))


def _match(ctx: CheckContext) -> tuple[float, ConventionMatch]:
    """Return the mean error over the examples, and the match."""
    pairs = [(case, _mismatch(ctx, check, case)) for check, case in _examples(ctx)]
    errors = [0.0 if mismatch is None else _error(mismatch) for _, mismatch in pairs]
    exact = all(mismatch is None for _, mismatch in pairs)
    return float(np.mean(errors)), ConventionMatch(ctx.setting.convention, exact, _describe(ctx.op, pairs))


def _mismatch(ctx: CheckContext, check: Check, case: Case) -> Mismatch | None:
    try:
        check.test(ctx, case)
    except Mismatch as mismatch:
        return mismatch
    except Skip:
        pass
    return None


def _error(mismatch: Mismatch) -> float:
    """Return the largest error. A wrong shape, NaN or an exception counts as `INCOMPARABLE`."""
    if mismatch.got is None or mismatch.expected is None or mismatch.got.shape != mismatch.expected.shape:
        return INCOMPARABLE
    return float(np.nan_to_num(np.abs(mismatch.got - mismatch.expected), nan=INCOMPARABLE).max())


def _describe(op: OpSpec, pairs: Sequence[tuple[Case, Mismatch | None]]) -> str:
    """Describe the largest difference over the examples."""
    comparable = [(case, each) for case, each in pairs if each is not None and _error(each) < INCOMPARABLE]
    if not comparable:
        return "it returned no comparable results"
    case, worst = max(comparable, key=lambda pair: _error(pair[1]))
    assert worst.expected is not None
    assert worst.got is not None
    if op.describe_difference is not None:
        return op.describe_difference(case, worst.expected, worst.got)
    return f"differs by up to {_error(worst):.3g}"
