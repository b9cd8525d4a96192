"""Data types of the kit: operations with a reference, checks, and mutants (known mistakes).

The checks of a stage are ordered. The cases of each check depend only on its own property and on the properties of
earlier checks. So the *first* check that fails identifies the mistake. Every mutant has the name of this check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis.strategies import SearchStrategy

from .._checks import Array
from ..conventions import Convention

if TYPE_CHECKING:
    from .context import CheckContext

Function = Callable[..., Any]


class Stage(Enum):
    """Stages of checks, in order. If a smoke check fails, the later stages do not run."""

    SMOKE = "smoke"
    SHAPES = "shapes"
    VALUES = "values"
    GRADIENTS = "gradients"
    IDENTITIES = "identities"
    COST = "cost"


class Mismatch(AssertionError):
    """Failure of a check.

    Args:
        message: description in one line.
        expected, got: the two arrays, if arrays were compared.
        case: arguments of the failing call, if the test derived them from its case.
    """

    def __init__(
        self, message: str, expected: Array | None = None, got: Array | None = None, case: Case | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.expected, self.got, self.case = message, expected, got, case


class Skip(Exception):
    """Raised by a check that does not apply, e.g. under this convention. The message gives the reason."""


def pretty_repr(self: object, printer: Any, cycle: bool) -> None:
    """Print the representation. Hypothesis and IPython would print every field of a dataclass instead."""
    printer.text(repr(self))


@dataclass(frozen=True)
class Case:
    """Arguments of one call, in order: arrays and dicts of arrays in float64, sizes, and options."""

    arguments: Mapping[str, Any]
    name: str = ""

    def __repr__(self) -> str:
        """Return name and arguments, with shapes instead of elements: Hypothesis and pytest print cases."""
        return f"Case({show_shapes(self.arguments)}, name={self.name!r})"

    _repr_pretty_ = pretty_repr

    def arrays(self) -> dict[str, Array]:
        """Return the arrays among the arguments. The entry of a dict is named ``argument.name``."""
        return named_arrays(self.arguments)

    def with_arrays(self, arrays: Mapping[str, Array]) -> Case:
        """Return the case with some arrays replaced."""
        arguments = dict(self.arguments)
        for name, array in arrays.items():
            argument, _, key = name.partition(".")
            arguments[argument] = {**arguments[argument], key: array} if key else array
        return replace(self, arguments=arguments)


def show_shapes(value: Any) -> str:
    """Return a representation with the dtype and shape of each array instead of its elements.

    >>> show_shapes({"x": np.zeros((2, 3)), "stride": (1, 2)})
    "{'x': <float64 (2, 3)>, 'stride': (1, 2)}"
    """
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {value.shape}>"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {show_shapes(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        opening, closing = "[]" if isinstance(value, list) else "()"
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return opening + ", ".join(map(show_shapes, value)) + comma + closing
    return repr(value)


def named_arrays(values: Mapping[str, Any]) -> dict[str, Array]:
    """Return the arrays among named values. The entry of a dict is named ``name.key``."""
    found = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            found[name] = value
        elif isinstance(value, Mapping):
            found.update({f"{name}.{key}": entry for key, entry in value.items() if isinstance(entry, np.ndarray)})
    return found


@dataclass(frozen=True)
class Setting:
    """Setting of a run.

    Args:
        convention: convention of the reference, if the operation depends on it.
        dtype: dtype of the arrays. The reference computes in float64 from the same rounded values.
        max_examples: number of cases that Hypothesis draws for each check.
    """

    convention: Convention = Convention.CELL_CENTER
    dtype: str = "float64"
    max_examples: int = 50


def matches_reference(ctx: CheckContext, case: Case) -> None:
    """Require the reference's result: the test of most checks."""
    ctx.compare(case)


@dataclass(frozen=True)
class Check:
    """Property of an operation, with a test.

    Args:
        name: name of the property in snake case.
        stage: stage of the check.
        property: one sentence, true of a correct implementation.
        explanation: likely causes of a failure.
        examples: named cases that run first and also serve as documentation; a function of the setting if positions are
            in the coordinates of its convention.
        strategy: returns the Hypothesis strategy for a setting; None to run the examples only.
        test: raises `Mismatch` or `Skip`. Any other exception comes from the implementation.
        degenerate: whether the cases have an axis of length one, for which other mistakes can give arbitrary results.
    """

    name: str
    stage: Stage
    property: str
    explanation: str
    examples: Sequence[Case] | Callable[[Setting], Sequence[Case]] = ()
    strategy: Callable[[Setting], SearchStrategy[Case]] | None = None
    test: Callable[[CheckContext, Case], None] = matches_reference
    degenerate: bool = False

    def __repr__(self) -> str:
        """Return the name; the examples would print all their elements."""
        return f"Check({self.name!r})"

    _repr_pretty_ = pretty_repr

    def cases(self, setting: Setting) -> Sequence[Case]:
        """Return the examples under a setting."""
        return self.examples(setting) if callable(self.examples) else self.examples


@dataclass(frozen=True)
class Implementation:
    """Implementation under test, as functions of the operation's arguments.

    Args:
        name: import path ``package.module:object``, used in code snippets.
        forward: ``forward(*arguments)``; with ``convention=`` if it takes one.
        vjp: ``vjp(cotangent, *arguments)`` -> gradients of the differentiable arguments, in order or by name.
        takes_convention: whether both functions take ``convention=``.
        keywords: names of keyword-only arguments of both functions.
    """

    name: str
    forward: Function
    vjp: Function | None = None
    takes_convention: bool = False
    keywords: Sequence[str] = ()


@dataclass(frozen=True)
class Mutant:
    """Known mistake. It proves that a check detects it, and is the diagnosis of implementations with equal results.

    Args:
        name: short description for the report, e.g. "x and y swapped".
        check: name of the first check that rejects it.
        forward: turns a correct function into a wrong one.
        vjp: turns a correct gradient into a wrong one.
    """

    name: str
    check: str
    forward: Callable[[Function], Function] | None = None
    vjp: Callable[[Function], Function] | None = None

    def apply(self, implementation: Implementation) -> Implementation:
        """Return the implementation with the mistake. With a wrong forward it has no gradient."""
        if self.forward is not None:
            return replace(implementation, name=self.name, forward=self.forward(implementation.forward), vjp=None)
        assert self.vjp is not None
        assert implementation.vjp is not None
        return replace(implementation, name=self.name, vjp=self.vjp(implementation.vjp))


def apply_mutants(implementation: Implementation, mutants: Sequence[Mutant]) -> Implementation:
    """Return an implementation with several mistakes, applied in order."""
    return reduce(lambda mutated, mutant: mutant.apply(mutated), mutants, implementation)


@dataclass(frozen=True)
class Argument:
    """Argument of an operation.

    Args:
        name: name in the protocol.
        axes: string of letters, e.g. "NCHW"; empty for a size or an option.
        description: description for users.
        differentiable: whether it has a gradient.
        extent: returns the largest possible element, given the arguments of a case, if the elements of the case do not
            show it. E.g. a position may be stored as a fraction of a long map, and is rounded accordingly.
    """

    name: str
    axes: str
    description: str
    differentiable: bool = False
    extent: Callable[[Mapping[str, Any]], float] | None = None


@dataclass(frozen=True)
class OpSpec:
    """Operation that the kit can check.

    Args:
        name: value of ``--op``.
        title: description in one line.
        function: name of the function in the protocol; its gradient is ``<function>_vjp``.
        arguments: arguments in the order of the call.
        returns: axes of the result.
        reference: reference implementation; its `forward` takes ``convention=`` if `depends_on_convention`.
        draw: ``draw(case, mismatch)`` returns the case, the expected and the actual result as text. It also takes the
            convention if `depends_on_convention`.
        select_output: returns the part of the function's result that is compared.
        depends_on_convention: whether the result depends on the convention.
        describe_difference: describes the difference of two results in words, e.g. "half a key cell down and right".
        checks: checks in order.
        mutants: known mistakes.
    """

    name: str
    title: str
    function: str
    arguments: Sequence[Argument]
    returns: str
    reference: Implementation
    draw: Callable[..., str]
    select_output: Callable[[Any], Any] = lambda returned: returned
    depends_on_convention: bool = False
    describe_difference: Callable[[Case, Array, Array], str] | None = None
    checks: Sequence[Check] = field(default=())
    mutants: Sequence[Mutant] = field(default=())

    def __repr__(self) -> str:
        """Return the name; checks and mutants would print all their examples."""
        return f"OpSpec({self.name!r})"

    _repr_pretty_ = pretty_repr

    @property
    def signature(self) -> str:
        """The call in one line: ``bilinear_sample(x, points_px)``."""
        return f"{self.function}({', '.join(self.argument_names)})"

    @property
    def argument_names(self) -> list[str]:
        """Names of the arguments, in order."""
        return [argument.name for argument in self.arguments]

    @property
    def differentiable_arguments(self) -> list[str]:
        """Names of the arguments that have gradients."""
        return [argument.name for argument in self.arguments if argument.differentiable]

    def check(self, name: str) -> Check:
        """Return a check by name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)
