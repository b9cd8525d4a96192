"""Code snippet that reproduces a counter-example: NumPy literals, the call, and the expected result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._checks import Array
from ..conventions import Convention
from .context import CheckContext
from .op_spec import Case, Mismatch, Stage
from .strategies import integers

FEW_ELEMENTS, MANY_ELEMENTS = 4, 24  # larger arrays are written as expressions if possible
WIDTH = 100
MAX_EXPECTED_ELEMENTS = 12


def snippet(ctx: CheckContext, case: Case, mismatch: Mismatch, stage: Stage) -> str:
    """Return a program that calls the implementation with the case, with the expected result as a comment."""
    arguments = ctx.cast(case).arguments
    lines = ["import numpy as np"]
    if ctx.implementation.takes_convention:
        lines.append("from dat_ref import Convention")
    call, imports = _callable(ctx, stage)
    lines += [*imports, ""]
    lines += [
        format_assignment(name, value, values_matter=stage is not Stage.COST) for name, value in arguments.items()
    ]
    keywords = ctx.implementation.keywords
    call_arguments = [name for name in arguments if name not in keywords] + [f"{name}={name}" for name in keywords]
    if stage is Stage.GRADIENTS:
        cotangent = integers(0, *ctx.expected(case).shape)  # as in most gradient checks
        lines.append(format_assignment("cotangent", cotangent.astype(ctx.setting.dtype)))
        call_arguments.insert(0, "cotangent")
    if ctx.implementation.takes_convention:
        call_arguments.append(f"convention=Convention.{ctx.setting.convention.name}")
    call_text = f"{call}({', '.join(call_arguments)})"
    if stage is Stage.COST:
        measure = 'print(tracemalloc.get_traced_memory()[1], "bytes of peak memory")'
        return "\n".join(["import tracemalloc", *lines, "tracemalloc.start()", call_text, measure])
    lines.append(f"print({call_text})")
    if stage is Stage.GRADIENTS:
        expected = ctx.gradients(ctx.op.reference, cotangent, ctx.cast(case, np.float64))
        short = {name: grad for name, grad in expected.items() if grad.size <= MAX_EXPECTED_ELEMENTS}
        lines += [f"# the reference gives {name}: {_format_rounded(grad)}" for name, grad in short.items()]
    elif mismatch.expected is not None and mismatch.expected.size <= MAX_EXPECTED_ELEMENTS:
        lines.append(f"# expected {_format_rounded(mismatch.expected)}")
    return "\n".join(lines)


def _callable(ctx: CheckContext, stage: Stage) -> tuple[str, list[str]]:
    """Return the expression of the function, and its imports."""
    module, _, path = ctx.implementation.name.partition(":")
    forward, vjp = ctx.implementation.forward, ctx.implementation.vjp
    gradient = ""
    if stage is Stage.GRADIENTS:
        gradient = ".vjp" if getattr(forward, "vjp", None) == vjp else "_vjp"
    if not path:
        function = ctx.op.function + gradient
        return f"{module}.{function}" if module.isidentifier() else function, []
    first = (path + gradient).split(".")[0].removesuffix("()")
    return path + gradient, [f"from {module} import {first}"]


def format_assignment(name: str, value: object, *, values_matter: bool = True) -> str:
    """Return an assignment statement. The rows of an array are on separate lines.

    >>> print(format_assignment("x", np.array([[1.0, 2.0], [0.25, np.nan]])))
    x = np.array([[1., 2.],
                  [0.25, np.nan]])
    """
    if isinstance(value, Mapping):
        entries = [f"    {key!r}: {format_literal(each, 6 + len(repr(key)))}," for key, each in value.items()]
        return "\n".join([f"{name} = {{", *entries, "}"])
    return f"{name} = {format_literal(value, len(f'{name} = '), values_matter=values_matter)}"


def format_literal(value: object, column: int = 0, *, values_matter: bool = True) -> str:
    """Return an expression for a value that starts at a column.

    >>> format_literal(np.arange(1.0, 31.0).reshape(5, 6))
    'np.arange(1.0, 31).reshape(5, 6)'
    >>> format_literal(np.array([0.5, np.inf])), format_literal((1, 2))
    ('np.array([0.5, np.inf])', '(1, 2)')
    """
    if isinstance(value, Convention):
        return f"Convention.{value.name}"
    if not isinstance(value, np.ndarray):
        return repr(value)
    dtype_argument = "" if value.dtype == np.float64 else f", dtype={str(value.dtype)!r}"
    if not value.size:
        return f"np.zeros({value.shape}{dtype_argument})"
    if value.size > MANY_ELEMENTS and np.array_equal(value, np.arange(1.0, value.size + 1).reshape(value.shape)):
        return f"np.arange(1.0, {value.size + 1}{dtype_argument}).reshape{value.shape}"
    if value.size > FEW_ELEMENTS and (
        (value == value.flat[0]).all() or (value.size > MANY_ELEMENTS and not values_matter)
    ):
        return f"np.full({value.shape}, {_qualify_non_finite(str(value.flat[0]))}{dtype_argument})"
    reshaped = ""
    if value.size > FEW_ELEMENTS and value.shape[-1] == 1:  # avoids one line per element
        value, reshaped = value.ravel(), f".reshape{value.shape}"
    return f"np.array({_format_rows(value, column + len('np.array('))}{dtype_argument}){reshaped}"


def _format_rows(array: Array, column: int) -> str:
    """Return nested lists with one row per line and the shortest exact digits; the brackets open at a column."""

    def number(value: Any) -> str:
        return _qualify_non_finite(np.format_float_positional(value, unique=True))

    rows = np.array2string(
        array,
        separator=", ",
        prefix=" " * column,
        max_line_width=WIDTH,
        threshold=array.size + 1,
        formatter={"float_kind": number},
    )
    return re.sub(r"\n\s*\n", "\n", rows)


def _format_rounded(array: Array) -> str:
    """Return nested lists on one line, rounded to nine decimals, because further digits depend on the machine."""
    return _qualify_non_finite(repr(np.round(array, 9).tolist()))


def _qualify_non_finite(text: str) -> str:
    """Replace nan and inf by NumPy's names."""
    return text.replace("nan", "np.nan").replace("inf", "np.inf")
