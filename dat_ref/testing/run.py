"""Test runner: runs the named examples of each check, then cases that Hypothesis draws and shrinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from .context import CheckContext
from .diagnosis import diagnose
from .op_spec import (
    Case,
    Check,
    Implementation,
    Mismatch,
    Mutant,
    OpSpec,
    Setting,
    Skip,
    Stage,
    apply_mutants,
)


@dataclass(frozen=True)
class Failure:
    """Counter-example of a check, shrunk if possible."""

    case: Case
    mismatch: Mismatch


@dataclass(frozen=True)
class Result:
    """Result of a check.

    Args:
        check: the check.
        failure: counter-example, or None.
        skipped: reason why it did not run, or "".
        skipped_cases: reason why it did not run on some of its cases, or "".
        expected_failure: reason in the list of expected failures, or None.
    """

    check: Check
    failure: Failure | None = None
    skipped: str = ""
    skipped_cases: str = ""
    expected_failure: str | None = None

    @property
    def status(self) -> str:
        """``pass``, ``fail``, ``skip``, ``xfail`` (failed as expected) or ``xpass`` (passed unexpectedly)."""
        if self.skipped:
            return "skip"
        if self.expected_failure is not None:
            return "xfail" if self.failure else "xpass"
        return "fail" if self.failure else "pass"


@dataclass(frozen=True)
class Report:
    """Results of all checks of one operation. `diagnosis` names the known mistakes that explain the failures."""

    context: CheckContext
    results: list[Result]
    diagnosis: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if there is no unexpected failure and no unexpected pass."""
        return not any(result.status in ("fail", "xpass") for result in self.results)

    def failed(self, stage: Stage | None = None) -> list[Result]:
        """Return the failures of one stage or of all stages, in order, with the expected ones."""
        return [result for result in self.results if result.failure and stage in (None, result.check.stage)]

    def matched_mutants(self) -> list[Mutant]:
        """Return the mutants of the diagnosis."""
        by_name = {mutant.name: mutant for mutant in self.context.op.mutants}
        return [by_name[name] for name in self.diagnosis]

    def detailed_failures(self) -> list[Result]:
        """Return the failures to report in detail: the first unexpected one per stage, and those of the diagnosis."""
        named = {mutant.check for mutant in self.matched_mutants()}
        unexpected = [result for result in self.results if result.status == "fail"]
        first_of_stage = {result.check.stage: result for result in reversed(unexpected)}.values()
        return [result for result in unexpected if result in first_of_stage or result.check.name in named]


def check_op(
    implementation: Implementation,
    op: OpSpec,
    setting: Setting | None = None,
    expected_failures: Mapping[str, str] | None = None,
    *,
    shrink: bool = True,
) -> Report:
    """Run every check of an operation, in order.

    Args:
        implementation: implementation under test.
        op: the operation.
        setting: convention, dtype and number of cases.
        expected_failures: reasons by name of the check, ``first_pixel`` or ``sampler.first_pixel``.
        shrink: whether to shrink the counter-example of each stage's first failure.
    """
    ctx = CheckContext(implementation, op, setting or Setting())
    expected_failures = expected_failures or {}
    results: list[Result] = []
    for check in op.checks:
        reason = expected_failures.get(f"{op.name}.{check.name}", expected_failures.get(check.name))
        failed_stages = [result.check.stage for result in results if result.failure]
        stages_shown = [result.check.stage for result in results if result.status == "fail"]
        if Stage.SMOKE in failed_stages and check.stage is not Stage.SMOKE:
            results.append(Result(check, skipped="a smoke check fails"))
        else:
            # Only the first unexpected failure of a stage is shown in detail, so only its counter-example is shrunk.
            shrink_case = shrink and reason is None and check.stage not in stages_shown
            results.append(run_check(ctx, check, reason, shrink=shrink_case))
    report = Report(ctx, results)
    cases = [result.failure.case for result in report.failed() if result.failure]
    report.diagnosis.extend(diagnose(ctx, cases, [result.check.name for result in report.failed()]))
    if shrink and len(report.diagnosis) > 1:
        results[:] = [_isolate(ctx, result, report.matched_mutants()) for result in results]
    return report


def _isolate(ctx: CheckContext, result: Result, mutants: Sequence[Mutant]) -> Result:
    """Return a result with a counter-example for its own mistake, which fails even without the other mistakes."""
    others = [mutant for mutant in mutants if mutant.check != result.check.name]
    if result.failure is None or len(others) == len(mutants):
        return result
    reference = apply_mutants(ctx.op.reference, others)
    failure = find_failure(replace(ctx, op=replace(ctx.op, reference=reference)), result.check)
    if failure is None:
        return result
    try:
        result.check.test(ctx, failure.case)
    except Mismatch as mismatch:
        return replace(result, failure=Failure(mismatch.case or failure.case, mismatch))
    return result


def run_check(ctx: CheckContext, check: Check, reason: str | None = None, *, shrink: bool = True) -> Result:
    """Run one check.

    Args:
        ctx: context with the implementation.
        check: the check.
        reason: reason of an expected failure, or None.
        shrink: whether to shrink the counter-example.
    """
    if check.stage is Stage.GRADIENTS and ctx.implementation.vjp is None:
        return Result(check, skipped="the implementation has no gradient")
    skipped_cases: list[Skip] = []
    try:
        failure = find_failure(ctx, check, skipped_cases, shrink=shrink)
    except Skip as skip:
        return Result(check, skipped=str(skip))
    return Result(check, failure, skipped_cases=str(skipped_cases[0]) if skipped_cases else "", expected_failure=reason)


def find_failure(
    ctx: CheckContext, check: Check, skipped_cases: list[Skip] | None = None, *, shrink: bool = True
) -> Failure | None:
    """Return a counter-example: the smallest that Hypothesis finds, or else the first failing example.

    Args:
        ctx: context with the implementation.
        check: the check.
        skipped_cases: list to which skipped cases are appended if other cases ran.
        shrink: whether to shrink the counter-example.

    Raises:
        Skip: if all cases were skipped.
    """
    skips: list[Skip] = []
    ran = False

    def attempt(case: Case) -> Mismatch | None:
        nonlocal ran
        try:
            check.test(ctx, case)
        except Mismatch as mismatch:
            ran = True
            return mismatch
        except Skip as skip:
            skips.append(skip)
        else:
            ran = True
        return None

    found = None
    for case in check.cases(ctx.setting):
        mismatch = attempt(case)
        if mismatch is not None:
            found = Failure(mismatch.case or case, mismatch)
            break
    if check.strategy is not None and (found is None or shrink):
        found = _search(check.strategy(ctx.setting), attempt, ctx.setting.max_examples, shrink=shrink) or found
    if skips and not ran:
        raise skips[0]
    if skipped_cases is not None:
        skipped_cases += skips
    return found


def _search(
    strategy: SearchStrategy[Case], attempt: Callable[[Case], Mismatch | None], max_examples: int, *, shrink: bool
) -> Failure | None:
    """Search for a failure with Hypothesis, which runs the smallest one last."""
    last: Failure | None = None

    @settings(
        max_examples=max_examples,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        database=None,
        deadline=None,
        derandomize=True,  # reproducible results
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def look(case: Case) -> None:
        nonlocal last
        mismatch = attempt(case)
        if mismatch is not None:
            last = Failure(mismatch.case or case, mismatch)
            raise mismatch

    try:
        look()
    except (Mismatch, Flaky):  # flaky: a nondeterministic implementation also fails
        return last
    return None
