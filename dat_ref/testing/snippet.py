"""A few lines that reproduce a counter-example by themselves: NumPy literals, the call, and what was expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._checks import Array
from ..conventions import Convention
from .strategies import numbers
from .subject import Case, Mismatch, Stage
from .trial import Trial

FEW, LARGE = 4, 24  # numbers; a larger array is made by an expression, if there is one
WIDTH = 100
LONGEST_EXPECTED = 12  # numbers


def snippet(trial: Trial, case: Case, mismatch: Mismatch, stage: Stage) -> str:
    """Return a program that calls the implementation with the case, and says what was expected."""
    arguments = trial.cast(case).arguments
    lines = ["import numpy as np"]
    if trial.implementation.takes_convention:
        lines.append("from dat_ref import Convention")
    call, imports = _callable(trial, stage)
    lines += [*imports, ""]
    lines += [assigned(name, value, values_matter=stage is not Stage.COST) for name, value in arguments.items()]
    keywords = trial.implementation.keywords
    inside = [name for name in arguments if name not in keywords] + [f"{name}={name}" for name in keywords]
    if stage is Stage.GRADIENTS:
        cotangent = numbers(0, *trial.expected(case).shape)  # that of most checks of gradients
        lines.append(assigned("cotangent", cotangent.astype(trial.setting.dtype)))
        inside.insert(0, "cotangent")
    if trial.implementation.takes_convention:
        inside.append(f"convention=Convention.{trial.setting.convention.name}")
    called = f"{call}({', '.join(inside)})"
    if stage is Stage.COST:
        measure = 'print(tracemalloc.get_traced_memory()[1], "bytes at its peak")'
        return "\n".join(["import tracemalloc", *lines, "tracemalloc.start()", called, measure])
    lines.append(f"print({called})")
    if stage is Stage.GRADIENTS:
        expected = trial.gradients(trial.subject.reference, cotangent, trial.cast(case, np.float64))
        short = {name: grad for name, grad in expected.items() if grad.size <= LONGEST_EXPECTED}
        lines += [f"# the reference gives {name}: {_plain(grad)}" for name, grad in short.items()]
    elif mismatch.expected is not None and mismatch.expected.size <= LONGEST_EXPECTED:
        lines.append(f"# expected {_plain(mismatch.expected)}")
    return "\n".join(lines)


def _callable(trial: Trial, stage: Stage) -> tuple[str, list[str]]:
    """Return how the function is called, and the imports for it."""
    module, _, path = trial.implementation.name.partition(":")
    forward, vjp = trial.implementation.forward, trial.implementation.vjp
    gradient = ""
    if stage is Stage.GRADIENTS:
        gradient = ".vjp" if getattr(forward, "vjp", None) == vjp else "_vjp"
    if not path:
        function = trial.subject.function + gradient
        return f"{module}.{function}" if module.isidentifier() else function, []
    first = (path + gradient).split(".")[0].removesuffix("()")
    return path + gradient, [f"from {module} import {first}"]


def assigned(name: str, value: object, *, values_matter: bool = True) -> str:
    """Return a line that gives a value to a name; an array's rows stand below each other.

    >>> print(assigned("x", np.array([[1.0, 2.0], [0.25, np.nan]])))
    x = np.array([[1., 2.],
                  [0.25, np.nan]])
    """
    if isinstance(value, Mapping):
        entries = [f"    {key!r}: {literal(each, 6 + len(repr(key)))}," for key, each in value.items()]
        return "\n".join([f"{name} = {{", *entries, "}"])
    return f"{name} = {literal(value, len(f'{name} = '), values_matter=values_matter)}"


def literal(value: object, column: int = 0, *, values_matter: bool = True) -> str:
    """Return an expression for a value, to stand at a column.

    >>> literal(np.arange(1.0, 31.0).reshape(5, 6)), literal(np.array([0.5, np.inf])), literal((1, 2))
    ('np.arange(1.0, 31).reshape(5, 6)', 'np.array([0.5, np.inf])', '(1, 2)')
    """
    if isinstance(value, Convention):
        return f"Convention.{value.name}"
    if not isinstance(value, np.ndarray):
        return repr(value)
    kind = "" if value.dtype == np.float64 else f", dtype={str(value.dtype)!r}"
    if not value.size:
        return f"np.zeros({value.shape}{kind})"
    if value.size > LARGE and np.array_equal(value, np.arange(1.0, value.size + 1).reshape(value.shape)):
        return f"np.arange(1.0, {value.size + 1}{kind}).reshape{value.shape}"
    if value.size > FEW and ((value == value.flat[0]).all() or (value.size > LARGE and not values_matter)):
        return f"np.full({value.shape}, {_named(str(value.flat[0]))}{kind})"
    reshaped = ""
    if value.size > FEW and value.shape[-1] == 1:  # a column would be long
        value, reshaped = value.ravel(), f".reshape{value.shape}"
    return f"np.array({_rows(value, column + len('np.array('))}{kind}){reshaped}"


def _rows(array: Array, column: int) -> str:
    """Return all numbers, row below row, as many digits as tell them apart; the brackets open at a column."""

    def number(value: Any) -> str:
        return _named(np.format_float_positional(value, unique=True))

    rows = np.array2string(
        array,
        separator=", ",
        prefix=" " * column,
        max_line_width=WIDTH,
        threshold=array.size + 1,
        formatter={"float_kind": number},
    )
    return re.sub(r"\n\s*\n", "\n", rows)


def _plain(array: Array) -> str:
    """Return nested lists on one line, to nine decimals: the last ones differ from machine to machine."""
    return _named(repr(np.round(array, 9).tolist()))


def _named(text: str) -> str:
    """Return NaN and infinity under NumPy's names."""
    return text.replace("nan", "np.nan").replace("inf", "np.inf")
