"""Conformance kit on mutants: each fails first at its own check, is named, and is shown by a program that runs.

`test_testing_ours` shows that correct implementations pass.
"""

import sys
from contextlib import suppress
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from dat_ref import Convention
from dat_ref.testing import OPS, Mutant, Setting, Skip, Stage, check_op
from dat_ref.testing.context import CheckContext, gradients_by_name
from dat_ref.testing.diagnosis import diagnose
from dat_ref.testing.ops import ATTENTION, BIAS, LAYER, SAMPLER
from dat_ref.testing.ops.layer_steps import LayerSteps, layer_in_steps
from dat_ref.testing.ops.sampler_mutants import sample_at
from dat_ref.testing.ops.steps import Steps, attend_in_steps, bias_in_steps, replace_steps
from dat_ref.testing.run import run_check
from dat_ref.testing.snippet import snippet

MUTANTS = [(op, mutant) for op in OPS for mutant in op.mutants]

# Common mistakes of ports, with words that occur in the names of the mutants.
COMMON_MISTAKES = {
    "x/y swapped": "x and y swapped",
    "half-pixel shift": "half a pixel",
    "H for H - 1": "H instead of H - 1",
    "square-only normalisation": "x is normalized by the height",
    "group order": "groups in reverse order",
    "missing scale": "the scale is missing",
    "missing offset bound": "no bound: the tanh is missing",
    "border dropped": "points outside the outermost pixel centers read zero",
    "border wrapped": "wraps around",
    "bias sign": "the displacement has the wrong sign",
    "bias transposed": "the table is transposed",
    "table off by one": "off by one",
    "gradient times 1.001": "0.1 % too large",
    "position gradient through the bias forgotten": "the points' gradient through the bias is missing",
    "half-precision geometry": "bfloat16",
    "padding keys attended": "padding keys are attended",
}


@pytest.mark.parametrize(("op", "mutant"), MUTANTS, ids=lambda each: each.name)
def test_each_mutant_is_rejected_by_the_check_named_for_it(op, mutant, monkeypatch):
    """The first failing check is the mutant's own, the diagnosis names the mutant, and the program shows the error."""
    port = replace(mutant.apply(op.reference), name=f"port:{op.function}")
    ctx = CheckContext(port, op, Setting(max_examples=3))
    results = (run_check(ctx, check, shrink=False) for check in op.checks)
    first = next(result for result in results if result.failure)
    assert first.check.name == mutant.check
    assert diagnose(ctx, [first.failure.case]) == [mutant.name]
    program = snippet(ctx, first.failure.case, first.failure.mismatch, first.check.stage)
    assert shows_a_difference(program, ctx, first.check.stage, monkeypatch)


def shows_a_difference(program, ctx, stage, monkeypatch):
    """Run a snippet and return whether it prints a difference."""
    module, op, printed = ModuleType("port"), ctx.op, []
    calls = {op.function: ctx.implementation.forward, f"{op.function}_vjp": ctx.implementation.vjp}
    for name, function in calls.items():
        setattr(
            module, name, lambda *given, function=function, **options: (function(*given, **options), given, options)
        )
    monkeypatch.setitem(sys.modules, "port", module)
    with np.errstate(all="ignore"):
        exec(program, {"print": printed.append})
    ((result, given, options),) = printed
    if stage is Stage.GRADIENTS:
        got, right = (
            gradients_by_name(each, op.differentiable_arguments)
            for each in (result, op.reference.vjp(*given, **options))
        )
        return any(over(got[name], right[name]) for name in right)
    return over(op.select_output(result), op.select_output(op.reference.forward(*given, **options)))


def over(got, expected):
    return np.shape(got) != np.shape(expected) or not np.allclose(got, expected, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("mistake", COMMON_MISTAKES)
def test_the_common_mistakes_are_mutants(mistake):
    """Each common mistake of ports is a mutant."""
    assert any(COMMON_MISTAKES[mistake] in mutant.name for _, mutant in MUTANTS)


def unchanged(step):
    return step


@pytest.mark.parametrize(
    ("op", "compute", "steps", "replaced"),
    [
        (BIAS, bias_in_steps, Steps(), "table_positions"),
        (ATTENTION, attend_in_steps, Steps(), "attend"),
        (LAYER, layer_in_steps, LayerSteps(), "bound"),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
@pytest.mark.parametrize("convention", Convention)
def test_without_a_mistake_the_steps_are_the_reference(op, compute, steps, replaced, convention):
    """Without a replaced step, the building blocks of the mutants equal the reference."""
    same = Mutant("nothing", "", replace_steps(compute, steps, **{replaced: unchanged}))
    setting = Setting(convention)
    ctx = CheckContext(same.apply(op.reference), op, setting)
    for check in op.checks:
        if check.stage in (Stage.SHAPES, Stage.VALUES):
            for case in check.cases(setting):
                with suppress(Skip):
                    check.test(ctx, case)


def test_a_report_names_the_first_failure_and_the_mistake():
    """All checks of one mutant, with the smallest counter-example."""
    mutant = next(mutant for mutant in BIAS.mutants if mutant.name == "x is normalized by the height")
    report = check_op(mutant.apply(BIAS.reference), BIAS, Setting(max_examples=10))
    assert not report.passed
    assert report.failed()[0].check.name == "not_square"
    assert report.diagnosis == ["x is normalized by the height"]


def test_mistakes_that_make_up_for_each_other_are_not_named():
    """Two mistakes that cancel (edges for centers and the reverse), except on a single row, are not named."""
    held = Mutant("held", "single_row", sample_at(lambda points, size, last: np.where(size == 1, 0.0, points)))
    report = check_op(held.apply(SAMPLER.reference), SAMPLER, Setting(max_examples=5))
    assert report.failed()[0].check.name == "single_row"
    assert report.diagnosis == []


def test_names_are_unique_and_mutants_name_checks():
    """Names of checks and mutants are unique, and the check of every mutant exists."""
    assert len({op.name for op in OPS}) == len({op.function for op in OPS}) == len(OPS)
    for op in OPS:
        checks, mutants = [check.name for check in op.checks], [mutant.name for mutant in op.mutants]
        assert len(set(checks)) == len(checks)
        assert len(set(mutants)) == len(mutants)
        assert {mutant.check for mutant in op.mutants} <= set(checks)
