"""Name the mistake: a mutant that gives what the implementation gives, wrong results included, is the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from .._checks import Array
from .subject import Case, Implementation, Mutant, Stage, with_mistakes
from .trial import Trial

CLOSE = {"float64": 1e-7, "float32": 1e-4}  # of the implementation to a mutant: both compute the same wrong thing
Outputs = Iterable[Array | None]  # None where it raised


def diagnose(trial: Trial, failing: Sequence[Case], failed: Collection[str] | None = None) -> list[str]:
    """Return the names of the mistakes that explain the failures: one, or two at once; empty if none known do.

    The named examples of the values stage are compared, first those that are not degenerate: what a formula that
    divides by H - 1 gives for a single row is anybody's choice. Only where they see nothing wrong are the failing cases
    taken.

    Args:
        failing: the cases that failed.
        failed: names of the checks that failed; a mistake whose own check holds was not made, though two that make up
            for each other may look alike. None where they are not known.
    """
    if not failing:
        return []
    for probes in (_examples(trial, Stage.VALUES, degenerate=False), _examples(trial, Stage.VALUES), failing):
        forward = list(_outputs(trial, probes, trial.call))
        pairs = zip(forward, _reference_outputs(trial, [], probes), strict=True)
        right = [_close(trial, ours, expected) for ours, expected in pairs]
        if not all(right):
            # First what is wrong: most mutants are right there.
            order = sorted(range(len(probes)), key=right.__getitem__)
            candidates = _candidates(trial, failed, "forward")
            return _first_match(trial, candidates, [forward[i] for i in order], [probes[i] for i in order])
    return _diagnose_gradient(trial, _candidates(trial, failed, "vjp"))


def _candidates(trial: Trial, failed: Collection[str] | None, part: str) -> list[Mutant]:
    of_part = [mutant for mutant in trial.subject.mutants if getattr(mutant, part) is not None]
    return [mutant for mutant in of_part if failed is None or mutant.check in failed]


def _first_match(
    trial: Trial, candidates: Sequence[Mutant], forward: Sequence[Array | None], probes: Sequence[Case]
) -> list[str]:
    for mistakes in _sets(candidates):
        if _same(trial, forward, _reference_outputs(trial, mistakes, probes)):
            return [mutant.name for mutant in mistakes]
    return []


def _sets(mutants: Sequence[Mutant]) -> Iterable[tuple[Mutant, ...]]:
    yield from ((mutant,) for mutant in mutants)
    yield from permutations(mutants, 2)


def _examples(trial: Trial, stage: Stage, *, degenerate: bool = True) -> list[Case]:
    chosen = [check for check in trial.subject.checks if check.stage is stage and (degenerate or not check.degenerate)]
    return [case for check in chosen for case in check.cases(trial.setting)]


def _reference_outputs(trial: Trial, mistakes: Sequence[Mutant], probes: Sequence[Case]) -> Outputs:
    return _outputs(trial, probes, trial.call, with_mistakes(trial.subject.reference, mistakes))


def _outputs(
    trial: Trial,
    probes: Sequence[Case],
    run: Callable[[Implementation, Case], Any],
    implementation: Implementation | None = None,
) -> Iterator[Any]:
    """Yield what an implementation gives, one by one: most are told apart by the first few."""
    for case in probes:
        try:
            with np.errstate(all="ignore"):
                output = run(implementation or trial.implementation, trial.cast(case))
        except Exception:
            output = None
        yield output


def _same(trial: Trial, outputs: Outputs, others: Outputs) -> bool:
    return all(_close(trial, one, other) for one, other in zip(outputs, others, strict=True))


def _close(trial: Trial, one: Array | None, other: Array | None) -> bool:
    if one is None or other is None:
        return one is other
    tolerance = CLOSE.get(trial.setting.dtype, 1e-2)
    return one.shape == other.shape and np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _diagnose_gradient(trial: Trial, candidates: Sequence[Mutant]) -> list[str]:
    """The same for gradients, where the forward is right."""
    if trial.implementation.vjp is None or not candidates:
        return []
    probes = _examples(trial, Stage.GRADIENTS)

    def gradients(implementation: Implementation, case: Case) -> Array:
        cotangent = np.ones(trial.call(trial.subject.reference, case).shape, dtype=trial.setting.dtype)
        grads = trial.gradients(implementation, cotangent, case)
        return np.concatenate([grads[name].ravel() for name in sorted(trial.differentiable(case))])

    ours = list(_outputs(trial, probes, gradients))
    for mutant in candidates:
        if _same(trial, ours, _outputs(trial, probes, gradients, mutant.apply(trial.subject.reference))):
            return [mutant.name]
    return []
