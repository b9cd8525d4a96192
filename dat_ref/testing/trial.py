"""One implementation of one subject under one setting: what it gives, what it should give, and whether they agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import Array
from .agreement import disagreement, over_budget
from .gradients import STEP, WrongGradient, check_vjp, numerical_gradient
from .subject import Case, Implementation, Mismatch, Setting, Skip, Subject, named_arrays

FLOAT64_TOLERANCE = 1e-9
SLOPE_TOLERANCE = 1e-6  # of a gradient against differences; a factor of 1.001 is a thousand times more


@dataclass(frozen=True)
class Trial:
    """What a check's test is handed."""

    implementation: Implementation
    subject: Subject
    setting: Setting

    def cast(self, case: Case, dtype: Any = None) -> Case:
        """Return the case with its arrays in the setting's precision (or, after that, in another)."""
        narrow = {name: array.astype(self.setting.dtype) for name, array in case.arrays().items()}
        return case.with_arrays({name: array.astype(dtype or array.dtype) for name, array in narrow.items()})

    def call(self, implementation: Implementation, case: Case) -> Array:
        """Call an implementation with the case as it stands, and return the part of its result that is compared."""
        return np.asarray(self.subject.result(self.returned(implementation, case)))

    def returned(self, implementation: Implementation, case: Case) -> Any:
        """Call an implementation with the case as it stands, and return all that it returns."""
        positional, by_name = self._arguments(implementation, case)
        return implementation.forward(*positional, **by_name)

    def _arguments(self, implementation: Implementation, case: Case) -> tuple[list[Any], dict[str, Any]]:
        options = {"convention": self.setting.convention} if implementation.takes_convention else {}
        by_name = {name: case.arguments[name] for name in implementation.keywords}
        return [value for name, value in case.arguments.items() if name not in by_name], {**by_name, **options}

    def got(self, case: Case) -> Array:
        """Return the implementation's result; whatever it raises becomes a mismatch.

        Raises:
            Skip: if it raises NotImplementedError: it says itself that it does not have an option.
        """
        try:
            got = self.call(self.implementation, self.cast(case))
        except NotImplementedError as error:
            raise Skip(f"not implemented: {error}") from error
        except Exception as error:
            raise Mismatch(f"it raised {type(error).__name__}: {error}", case=case) from error
        if not np.issubdtype(got.dtype, np.number):
            raise Mismatch(f"it returns {got.dtype}, not numbers", case=case)
        return got

    def expected(self, case: Case) -> Array:
        """Return the reference's result in float64, from the numbers that the implementation is given."""
        return self.call(self.subject.reference, self.cast(case, np.float64))

    def compare(self, case: Case, part: Any = ...) -> None:
        """Require the reference's result, or only a part of it: an index into the results."""
        got, expected = self.got(case), self.expected(case)
        if got.shape != expected.shape:
            raise Mismatch(f"expected shape {expected.shape}, got {got.shape}", expected, got)
        try:
            if self.setting.dtype == "float64":
                self.agree(got[part], expected[part])
            else:
                self.within_budget(got[part], expected[part], self._yardstick(case, expected)[part])
        except Mismatch as mismatch:
            raise Mismatch(mismatch.words, expected, got) from None

    def _yardstick(self, case: Case, expected: Array) -> Array:
        """Return a result that is as far off as the setting's precision makes one: the reference's own in it, or its
        result for inputs that are rounded in another way. Small whole numbers are rounded by nobody else's formula."""
        plain = self.call(self.subject.reference, self.cast(case))
        others = [
            self.call(self.subject.reference, self._rounded_otherwise(case, np.array(signs)))
            for signs in ((1, 1), (-1, -1), (1, -1), (-1, 1))  # y and x may make up for each other
        ]
        return np.asarray(expected + np.max([np.abs(other - expected) for other in (plain, *others)], axis=0))

    def _rounded_otherwise(self, case: Case, signs: Array) -> Case:
        """Return the case with each number moved by one rounding of the largest that may stand there, up or down; the
        signs alternate along the last axis."""
        rng, eps, wide = np.random.default_rng(0), np.finfo(self.setting.dtype).eps, self.cast(case, np.float64)
        extents = {each.name: each.extent(case.arguments) for each in self.subject.arguments if each.extent}
        moved = {}
        for name, array in wide.arrays().items():
            largest = max(np.abs(array).max(initial=0), extents.get(name, 0))
            alternating = np.resize(signs, array.shape[-1:])
            moved[name] = array + eps * largest * alternating * rng.choice([-1, 1], array.shape)
        return wide.with_arrays(moved)

    def agree(
        self,
        got: Array,
        expected: Array,
        tolerance: float = FLOAT64_TOLERANCE,
        case: Case | None = None,
        what: str = "",
    ) -> None:
        """Require agreement to a tolerance, as far as the setting's precision allows it; `case` as in `Mismatch`."""
        finest = max(tolerance, 32 * float(np.finfo(self.setting.dtype).eps))
        words = disagreement(got, expected, finest)
        if words:
            raise Mismatch(what + words, expected, got, case)

    def within_budget(self, got: Array, expected: Array, plain: Array, what: str = "") -> None:
        """Require that a low-precision result is about as good as the reference's own in that precision."""
        narrow = plain.astype(self.setting.dtype)
        if got.shape != expected.shape:
            raise Mismatch(f"{what}expected shape {expected.shape}, got {got.shape}", expected, got)
        words = over_budget(got.astype(self.setting.dtype), expected, narrow)
        if words:
            raise Mismatch(what + words, expected, got)

    # -------------------------------------------------------------------------------------------- gradients

    def differentiable(self, case: Case) -> list[str]:
        """Return the names of the arrays that have gradients, as `Case.arrays` calls them."""
        return [name for name in case.arrays() if name.partition(".")[0] in self.subject.differentiable]

    def gradients(self, implementation: Implementation, cotangent: Array, case: Case) -> dict[str, Array]:
        """Return the gradients by name, whatever form the VJP returns them in."""
        assert implementation.vjp is not None
        positional, options = self._arguments(implementation, case)
        returned = implementation.vjp(cotangent, *positional, **options)
        names = self.subject.differentiable
        given = [name for name in names if case.arguments[name] is not None]
        short = isinstance(returned, (tuple, list)) and len(returned) == len(given)
        return by_name(returned, given if short else names)

    def compare_gradient(
        self, name: str, cotangent: Array, case: Case, *, one_sided: bool = False, step: float = STEP
    ) -> None:
        """Require that one gradient is the slope of the implementation's own forward, element by element.

        In a lower precision than float64, where slopes cannot be measured, it is compared with the spec's.

        Args:
            one_sided: on a kink: steps go in the direction of `step` only.
        """
        grads = self._its_gradients(cotangent, case, [name])
        if self.setting.dtype != "float64":
            self._gradients_within_budget(grads, cotangent, case)
            return

        def forward(array: Array) -> Array:
            return self.got(case.with_arrays({name: array}))

        array = case.arrays()[name]
        measured = numerical_gradient(forward, array, cotangent, one_sided=one_sided, step=step)
        self.agree(grads[name], measured, SLOPE_TOLERANCE, what=f"gradient of {name}: ")

    def compare_slopes(self, names: Iterable[str], case: Case, *, step: float = STEP) -> None:
        """The same along random directions: for arrays that are too large to be moved element by element."""
        names, rng = list(names), np.random.default_rng(0)
        if self.setting.dtype != "float64":
            cotangent = rng.standard_normal(self.expected(case).shape)
            self._gradients_within_budget(self._its_gradients(cotangent, case, names), cotangent, case)
            return
        inputs = {name: array for name, array in case.arrays().items() if name in names}
        try:
            check_vjp(
                lambda **arrays: self.got(case.with_arrays(arrays)),
                lambda cotangent, **arrays: self._its_gradients(cotangent, case.with_arrays(arrays), names),
                inputs,
                rng,
                step=step,
                tolerance=SLOPE_TOLERANCE,
            )
        except WrongGradient as error:
            raise Mismatch(f"gradient of {error}") from None

    def _its_gradients(self, cotangent: Array, case: Case, names: Iterable[str]) -> dict[str, Array]:
        """Return the implementation's gradients of these arrays."""
        try:
            grads = self.gradients(self.implementation, cotangent.astype(self.setting.dtype), self.cast(case))
        except Exception as error:
            raise Mismatch(f"its gradient raised {type(error).__name__}: {error}") from error
        missing = [name for name in names if name not in grads]
        if missing:
            raise Mismatch(f"it returns no gradient of {', '.join(missing)}")
        return {name: grads[name] for name in names}

    def _gradients_within_budget(self, grads: Mapping[str, Array], cotangent: Array, case: Case) -> None:
        narrow, dtype = self.cast(case), self.setting.dtype
        exact = self.gradients(
            self.subject.reference, cotangent.astype(dtype).astype(np.float64), self.cast(case, np.float64)
        )
        plain = self.gradients(self.subject.reference, cotangent.astype(dtype), narrow)
        for name, grad in grads.items():
            self.within_budget(grad, exact[name], plain[name], f"gradient of {name}: ")


def by_name(returned: Any, names: list[str]) -> dict[str, Array]:
    """Return gradients by name: from a mapping, a sequence in the order of the arguments, or a single array.

    The gradient of a dict is a dict; its entries are called ``argument.name``, as in `Case.arrays`.
    """
    if not isinstance(returned, Mapping):
        if not isinstance(returned, (tuple, list)):
            returned = [returned]
        returned = dict(zip(names, returned))
    arrays = {
        name: grad if isinstance(grad, Mapping) else np.asarray(grad)
        for name, grad in returned.items()
        if grad is not None
    }
    return named_arrays(arrays)
