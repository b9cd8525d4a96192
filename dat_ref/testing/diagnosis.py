"""Diagnosis: the mutants whose results, wrong ones included, equal the results of the implementation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from .._checks import Array
from .context import CheckContext
from .op_spec import Case, Implementation, Mutant, Stage, apply_mutants

TOLERANCES = {"float64": 1e-7, "float32": 1e-4}  # between an implementation and a mutant with the same mistake
Outputs = Iterable[Array | None]  # None for a call that raised


def diagnose(
    ctx: CheckContext, failing_cases: Sequence[Case], failed_checks: Collection[str] | None = None
) -> list[str]:
    """Return the names of the one or two known mistakes that explain the failures, or an empty list.

    The named examples of the values stage are compared. Degenerate examples come second, because results for a single
    row are arbitrary if a formula divides by H - 1. If all examples agree, the failing cases are compared.

    Args:
        ctx: context with the implementation.
        failing_cases: cases that failed.
        failed_checks: names of the checks that failed, or None if not known. A mistake whose own check passed is
            excluded. Two mistakes that cancel could otherwise match.
    """
    if not failing_cases:
        return []
    for probes in (_examples(ctx, Stage.VALUES, degenerate=False), _examples(ctx, Stage.VALUES), failing_cases):
        forward = list(_outputs(ctx, probes, ctx.call))
        pairs = zip(forward, _reference_outputs(ctx, [], probes), strict=True)
        agrees = [_close(ctx, ours, expected) for ours, expected in pairs]
        if not all(agrees):
            # Wrong results come first: they exclude most mutants immediately.
            wrong_first = sorted(range(len(probes)), key=agrees.__getitem__)
            candidates = _candidates(ctx, failed_checks, "forward")
            return _first_match(ctx, candidates, [forward[i] for i in wrong_first], [probes[i] for i in wrong_first])
    return _diagnose_gradient(ctx, _candidates(ctx, failed_checks, "vjp"))


def _candidates(ctx: CheckContext, failed_checks: Collection[str] | None, part: str) -> list[Mutant]:
    mutants = [mutant for mutant in ctx.op.mutants if getattr(mutant, part) is not None]
    return [mutant for mutant in mutants if failed_checks is None or mutant.check in failed_checks]


def _first_match(
    ctx: CheckContext, candidates: Sequence[Mutant], forward: Sequence[Array | None], probes: Sequence[Case]
) -> list[str]:
    for mutants in _combinations(candidates):
        if _all_close(ctx, forward, _reference_outputs(ctx, mutants, probes)):
            return [mutant.name for mutant in mutants]
    return []


def _combinations(mutants: Sequence[Mutant]) -> Iterable[tuple[Mutant, ...]]:
    yield from ((mutant,) for mutant in mutants)
    yield from permutations(mutants, 2)


def _examples(ctx: CheckContext, stage: Stage, *, degenerate: bool = True) -> list[Case]:
    chosen = [check for check in ctx.op.checks if check.stage is stage and (degenerate or not check.degenerate)]
    return [case for check in chosen for case in check.cases(ctx.setting)]


def _reference_outputs(ctx: CheckContext, mutants: Sequence[Mutant], probes: Sequence[Case]) -> Outputs:
    return _outputs(ctx, probes, ctx.call, apply_mutants(ctx.op.reference, mutants))


def _outputs(
    ctx: CheckContext,
    probes: Sequence[Case],
    run: Callable[[Implementation, Case], Any],
    implementation: Implementation | None = None,
) -> Iterator[Any]:
    """Yield the results of an implementation lazily: a few of them distinguish most mutants."""
    for case in probes:
        try:
            with np.errstate(all="ignore"):
                output = run(implementation or ctx.implementation, ctx.cast(case))
        except (Exception, SystemExit):
            output = None
        yield output


def _all_close(ctx: CheckContext, outputs: Outputs, others: Outputs) -> bool:
    return all(_close(ctx, one, other) for one, other in zip(outputs, others, strict=True))


def _close(ctx: CheckContext, one: Array | None, other: Array | None) -> bool:
    if one is None or other is None:
        return one is other
    tolerance = TOLERANCES.get(ctx.setting.dtype, 1e-2)
    return one.shape == other.shape and np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _diagnose_gradient(ctx: CheckContext, candidates: Sequence[Mutant]) -> list[str]:
    """Diagnose the gradient of an implementation whose forward is correct."""
    if ctx.implementation.vjp is None or not candidates:
        return []
    probes = _examples(ctx, Stage.GRADIENTS)

    def gradients(implementation: Implementation, case: Case) -> Array:
        cotangent = np.ones(ctx.call(ctx.op.reference, case).shape, dtype=ctx.setting.dtype)
        grads = ctx.gradients(implementation, cotangent, case)
        return np.concatenate([grads[name].ravel() for name in sorted(ctx.differentiable_arrays(case))])

    ours = list(_outputs(ctx, probes, gradients))
    for mutant in candidates:
        if _all_close(ctx, ours, _outputs(ctx, probes, gradients, mutant.apply(ctx.op.reference))):
            return [mutant.name]
    return []
