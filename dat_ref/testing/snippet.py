"""A few lines that reproduce a counter-example by themselves: NumPy literals and the call."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .._checks import Array
from ..conventions import Convention
from .subject import Case, Mismatch, Stage
from .trial import Trial

LONGEST_LITERAL = 400  # numbers; a longer array is made by the expression it came from, or told to be long


def snippet(trial: Trial, case: Case, mismatch: Mismatch, stage: Stage) -> str:
    """Return a program that calls the implementation with the case, and says what was expected."""
    arguments = trial.cast(case).arguments
    lines = ["import numpy as np"]
    if trial.implementation.takes_convention:
        lines.append("from dat_ref import Convention")
    call, imports = _callable(trial, stage)
    lines += [*imports, ""]
    lines += [f"{name} = {literal(value)}" for name, value in arguments.items()]
    keywords = trial.implementation.keywords
    inside = [name for name in arguments if name not in keywords] + [f"{name}={name}" for name in keywords]
    if stage is Stage.GRADIENTS:
        shape = trial.call(trial.subject.reference, trial.cast(case)).shape
        lines.append(f"cotangent = np.ones({shape}, dtype={trial.setting.dtype!r})")
        inside.insert(0, "cotangent")
    if trial.implementation.takes_convention:
        inside.append(f"convention=Convention.{trial.setting.convention.name}")
    lines.append(f"print({call}({', '.join(inside)}))")
    if mismatch.expected is not None and mismatch.expected.size <= 12 and stage is not Stage.GRADIENTS:
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
    first = (path + gradient).split(".")[0]
    return path + gradient, [f"from {module} import {first}"]


def literal(value: object) -> str:
    """Return an expression for a value.

    >>> literal(np.arange(1.0, 5.0).reshape(2, 2)), literal(np.array([0.5, np.nan]))
    ('np.array([[1.0, 2.0], [3.0, 4.0]])', 'np.array([0.5, np.nan])')
    """
    if isinstance(value, Convention):
        return f"Convention.{value.name}"
    if isinstance(value, Mapping):
        return "{" + "".join(f"\n    {name!r}: {literal(each)}," for name, each in value.items()) + "\n}"
    if not isinstance(value, np.ndarray):
        return repr(value)
    kind = "" if value.dtype == np.float64 else f", dtype={str(value.dtype)!r}"
    counting = np.arange(1.0, value.size + 1).reshape(value.shape)
    if value.size > 24 and np.array_equal(value, counting):
        return f"np.arange(1.0, {value.size + 1}{kind}).reshape{value.shape}"
    if not value.size:
        return f"np.zeros({value.shape}{kind})"
    if value.size > LONGEST_LITERAL:
        return f"...  # {value.shape}, too long to write down"
    return f"np.array({_plain(value)}{kind})"


def _plain(array: Array) -> str:
    """Return nested lists, with NaN and infinity as NumPy's names."""
    return repr(array.tolist()).replace("nan", "np.nan").replace("inf", "np.inf")
