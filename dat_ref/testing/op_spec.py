"""What the kit is made of: an operation with its truth, the checks that judge it, and known mistakes.

The checks of a stage stand in an order: each draws cases that only its own property and those before it touch. So the
*first* check that fails names the mistake, and every mutant says which one that is.
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
    """From the plainest question to the subtlest; an operation that fails the first is asked no further."""

    SMOKE = "smoke"
    SHAPES = "shapes"
    VALUES = "values"
    GRADIENTS = "gradients"
    IDENTITIES = "identities"
    COST = "cost"


class Mismatch(AssertionError):
    """What a check found.

    Args:
        message: what is wrong, in a line.
        expected, got: the two arrays, where there are two to compare.
        case: what the implementation was called with, where a test made that of the case it was handed.
    """

    def __init__(
        self, message: str, expected: Array | None = None, got: Array | None = None, case: Case | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.expected, self.got, self.case = message, expected, got, case


class Skip(Exception):
    """What a check raises where its property is not claimed (under this convention, say); the message says why."""


@dataclass(frozen=True)
class Case:
    """Arguments of one call, in order: arrays (and dicts of arrays) in float64, sizes and options as they are."""

    arguments: Mapping[str, Any]
    name: str = ""

    def arrays(self) -> dict[str, Array]:
        """Return the arrays among the arguments; one in a dict is called ``argument.name``."""
        return named_arrays(self.arguments)

    def with_arrays(self, arrays: Mapping[str, Array]) -> Case:
        """Return the case with some arrays exchanged."""
        arguments = dict(self.arguments)
        for name, array in arrays.items():
            argument, _, key = name.partition(".")
            arguments[argument] = {**arguments[argument], key: array} if key else array
        return replace(self, arguments=arguments)


def named_arrays(values: Mapping[str, Any]) -> dict[str, Array]:
    """Return the arrays among named values, those in a dict under the names of both."""
    found = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            found[name] = value
        elif isinstance(value, Mapping):
            found.update({f"{name}.{key}": entry for key, entry in value.items() if isinstance(entry, np.ndarray)})
    return found


@dataclass(frozen=True)
class Setting:
    """How the checks are run.

    Args:
        convention: whose geometry is the truth, where that matters.
        dtype: of the arrays that are handed over. Truth is computed in float64 from the same numbers.
        max_examples: how many cases Hypothesis draws for each check.
    """

    convention: Convention = Convention.CELL_CENTER
    dtype: str = "float64"
    max_examples: int = 50


def matches_reference(ctx: CheckContext, case: Case) -> None:
    """The test of most checks: the same numbers as the reference."""
    ctx.compare(case)


@dataclass(frozen=True)
class Check:
    """A property, and how it is put to the test.

    Args:
        name: in snake case, of the property.
        property: one sentence, true of a right implementation.
        explanation: what is wrong when it fails, in plain words.
        examples: named cases that run first and double as documentation; a function of the setting where positions are
            handed over in the coordinates of its convention.
        strategy: what Hypothesis draws from under a setting; None leaves it at the examples.
        test: raises `Mismatch` (or `Skip`); any other exception counts as one of the implementation.
        degenerate: whether it is about an axis of one, where a mistake made elsewhere may give anything.
    """

    name: str
    stage: Stage
    property: str
    explanation: str
    examples: Sequence[Case] | Callable[[Setting], Sequence[Case]] = ()
    strategy: Callable[[Setting], SearchStrategy[Case]] | None = None
    test: Callable[[CheckContext, Case], None] = matches_reference
    degenerate: bool = False

    def cases(self, setting: Setting) -> Sequence[Case]:
        """Return the examples under a setting."""
        return self.examples(setting) if callable(self.examples) else self.examples


@dataclass(frozen=True)
class Implementation:
    """Something to be checked, as functions of the operation's arguments.

    Args:
        name: as people may import it, ``package.module:object``; the snippets use it.
        forward: ``forward(*arguments)``; with ``convention=`` if it takes one.
        vjp: ``vjp(cotangent, *arguments)`` -> the gradients of the differentiable arguments, in order or by name.
        takes_convention: whether both take ``convention=``.
        keywords: names of the arguments that both take by name, not by position.
    """

    name: str
    forward: Function
    vjp: Function | None = None
    takes_convention: bool = False
    keywords: Sequence[str] = ()


@dataclass(frozen=True)
class Mutant:
    """A known mistake: it proves that a check can see it, and names it when an implementation behaves the same.

    Args:
        name: a few words, "x and y swapped"; the report says it to people.
        check: the first check that rejects it.
        forward: makes a wrong function of a right one.
        vjp: makes a wrong gradient of a right one.
    """

    name: str
    check: str
    forward: Callable[[Function], Function] | None = None
    vjp: Callable[[Function], Function] | None = None

    def apply(self, implementation: Implementation) -> Implementation:
        """Return the implementation with the mistake. A wrong forward has no gradient of its own."""
        if self.forward is not None:
            return replace(implementation, name=self.name, forward=self.forward(implementation.forward), vjp=None)
        assert self.vjp is not None
        assert implementation.vjp is not None
        return replace(implementation, name=self.name, vjp=self.vjp(implementation.vjp))


def apply_mutants(implementation: Implementation, mutants: Sequence[Mutant]) -> Implementation:
    """Return an implementation with several mistakes, the first innermost."""
    return reduce(lambda mutated, mutant: mutant.apply(mutated), mutants, implementation)


@dataclass(frozen=True)
class Argument:
    """One argument.

    Args:
        axes: a string of letters ("NCHW"); empty for a size or an option.
        description: what it is.
        extent: how large its numbers may be in a case (from its arguments), where that is not seen from themselves: a
            position at the start of a long map may be kept as a fraction of the map, and is rounded as that is.
    """

    name: str
    axes: str
    description: str
    differentiable: bool = False
    extent: Callable[[Mapping[str, Any]], float] | None = None


@dataclass(frozen=True)
class OpSpec:
    """One operation.

    Args:
        name: as in ``--op``.
        title: what it does, in a line.
        function: the name under which the kit looks for it; ``<function>_vjp`` for the gradient.
        arguments: in the order of the call.
        returns: axes of the result.
        reference: the spec; its `forward` takes ``convention=`` if `depends_on_convention`.
        draw: ``draw(case, mismatch)``, a case as text with what was expected and what came; it is handed the
            convention too if `depends_on_convention`.
        select_output: what is compared, of what the function returns.
        depends_on_convention: whether the truth depends on the convention.
        describe_difference: the difference of two results in words ("half a key cell down and right"), for a convention
            not met.
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

    @property
    def signature(self) -> str:
        """The call, as one line: ``bilinear_sample(x, points_px)``."""
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
