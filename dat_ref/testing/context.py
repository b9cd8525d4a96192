"""Check context: one implementation of one operation under one setting, compared with the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import Array
from .agreement import disagreement, over_budget
from .gradients import STEP, WrongGradient, check_vjp, numerical_gradient
from .op_spec import Case, Implementation, Mismatch, OpSpec, Setting, Skip, named_arrays

FLOAT64_TOLERANCE = 1e-9
SLOPE_TOLERANCE = 1e-6  # for gradients against finite differences; a factor of 1.001 exceeds it a thousand times


@dataclass(frozen=True)
class CheckContext:
    """Context that a check's test receives."""

    implementation: Implementation
    op: OpSpec
    setting: Setting

    def cast(self, case: Case, dtype: Any = None) -> Case:
        """Return the case with its arrays rounded to the setting's dtype, and then converted to `dtype` if given."""
        rounded = {name: array.astype(self.setting.dtype) for name, array in case.arrays().items()}
        return case.with_arrays({name: array.astype(dtype or array.dtype) for name, array in rounded.items()})

    def call(self, implementation: Implementation, case: Case) -> Array:
        """Call an implementation without casting the case, and return the part of the result that is compared."""
        return np.asarray(self.op.select_output(self.raw_output(implementation, case)))

    def raw_output(self, implementation: Implementation, case: Case) -> Any:
        """Call an implementation without casting the case, and return its full result."""
        positional, keywords = self._arguments(implementation, case)
        return implementation.forward(*positional, **keywords)

    def _arguments(self, implementation: Implementation, case: Case) -> tuple[list[Any], dict[str, Any]]:
        options = {"convention": self.setting.convention} if implementation.takes_convention else {}
        keywords = {name: case.arguments[name] for name in implementation.keywords}
        return [value for name, value in case.arguments.items() if name not in keywords], {**keywords, **options}

    def got(self, case: Case) -> Array:
        """Return the implementation's result.

        Raises:
            Skip: if the implementation raises NotImplementedError, because it lacks an option.
            Mismatch: if it raises any other exception.
        """
        try:
            got = self.call(self.implementation, self.cast(case))
        except NotImplementedError as error:
            raise Skip(f"not implemented: {error}") from error
        except (Exception, SystemExit) as error:
            raise Mismatch(f"it raised {type(error).__name__}: {error}", case=case) from error
        if not np.issubdtype(got.dtype, np.number):
            raise Mismatch(f"it returned {got.dtype}, expected a numeric dtype", case=case)
        return got

    def expected(self, case: Case) -> Array:
        """Return the reference's result in float64, for the same rounded inputs as the implementation's."""
        return self.call(self.op.reference, self.cast(case, np.float64))

    def compare(self, case: Case, part: Any = ...) -> None:
        """Require the reference's result, or a part of it, given by an index."""
        got, expected = self.got(case), self.expected(case)
        if got.shape != expected.shape:
            raise Mismatch(f"expected shape {expected.shape}, got {got.shape}", expected, got)
        try:
            if self.setting.dtype == "float64":
                self.require_close(got[part], expected[part])
            else:
                self.require_within_budget(got[part], expected[part], self._yardstick(case, expected)[part])
        except Mismatch as mismatch:
            raise Mismatch(mismatch.message, expected, got) from None

    def _yardstick(self, case: Case, expected: Array) -> Array:
        """Return a result with a typical error of the setting's precision.

        The error is the largest one of the reference in this precision, and of the reference for inputs perturbed by
        one rounding. The perturbation matters for small integers, which the reference's formula does not round.
        """
        plain = self.call(self.op.reference, self.cast(case))
        others = [
            self.call(self.op.reference, self._perturbed(case, np.array(signs)))
            for signs in ((1, 1), (-1, -1), (1, -1), (-1, 1))  # errors in y and x can cancel
        ]
        return np.asarray(expected + np.max([np.abs(other - expected) for other in (plain, *others)], axis=0))

    def _perturbed(self, case: Case, signs: Array) -> Case:
        """Return the case with each element perturbed by one rounding of the largest possible element.

        The signs are random, times `signs`, repeated along the last axis.
        """
        rng, eps, exact = np.random.default_rng(0), np.finfo(self.setting.dtype).eps, self.cast(case, np.float64)
        extents = {each.name: each.extent(case.arguments) for each in self.op.arguments if each.extent}
        perturbed = {}
        for name, array in exact.arrays().items():
            largest = max(np.abs(array).max(initial=0), extents.get(name, 0))
            alternating = np.resize(signs, array.shape[-1:])
            perturbed[name] = array + eps * largest * alternating * rng.choice([-1, 1], array.shape)
        return exact.with_arrays(perturbed)

    def require_close(
        self,
        got: Array,
        expected: Array,
        tolerance: float = FLOAT64_TOLERANCE,
        case: Case | None = None,
        what: str = "",
    ) -> None:
        """Require agreement within a tolerance, or within the setting's precision if that is lower.

        Args:
            got, expected: arrays to compare.
            tolerance: absolute and relative tolerance.
            case: see `Mismatch`.
            what: prefix of the message.
        """
        floor = max(tolerance, 32 * float(np.finfo(self.setting.dtype).eps))
        message = disagreement(got, expected, floor)
        if message:
            raise Mismatch(what + message, expected, got, case)

    def require_within_budget(self, got: Array, expected: Array, yardstick: Array, what: str = "") -> None:
        """Require that a low-precision result is about as accurate as the reference in that precision."""
        rounded = yardstick.astype(self.setting.dtype)
        if got.shape != expected.shape:
            raise Mismatch(f"{what}expected shape {expected.shape}, got {got.shape}", expected, got)
        message = over_budget(got.astype(self.setting.dtype), expected, rounded)
        if message:
            raise Mismatch(what + message, expected, got)

    # -------------------------------------------------------------------------------------------- gradients

    def differentiable_arrays(self, case: Case) -> list[str]:
        """Return the names of the arrays that have gradients, as `Case.arrays` calls them."""
        return [name for name in case.arrays() if name.partition(".")[0] in self.op.differentiable_arguments]

    def gradients(self, implementation: Implementation, cotangent: Array, case: Case) -> dict[str, Array]:
        """Return the gradients by name, for any form in which the VJP returns them."""
        assert implementation.vjp is not None
        positional, options = self._arguments(implementation, case)
        returned = implementation.vjp(cotangent, *positional, **options)
        names = self.op.differentiable_arguments
        present = [name for name in names if case.arguments[name] is not None]
        skips_absent = isinstance(returned, (tuple, list)) and len(returned) == len(present)
        return gradients_by_name(returned, present if skips_absent else names)

    def compare_gradient(
        self, name: str, cotangent: Array, case: Case, *, one_sided: bool = False, step: float = STEP
    ) -> None:
        """Compare one gradient with finite differences of the implementation's own forward, element by element.

        In a lower precision than float64, finite differences are too inaccurate, and the gradient is compared with the
        reference's.

        Args:
            name: name of the array.
            cotangent: cotangent of the result.
            case: the case.
            one_sided: for a kink: use steps in the direction of `step` only.
            step: step of the finite differences.
        """
        grads = self._implementation_gradients(cotangent, case, [name])
        if self.setting.dtype != "float64":
            self._gradients_within_budget(grads, cotangent, case)
            return

        def forward(array: Array) -> Array:
            return self.got(case.with_arrays({name: array}))

        array = case.arrays()[name]
        measured = numerical_gradient(forward, array, cotangent, one_sided=one_sided, step=step)
        self.require_close(grads[name], measured, SLOPE_TOLERANCE, what=f"gradient of {name}: ")

    def compare_slopes(self, names: Iterable[str], case: Case, *, step: float = STEP) -> None:
        """Compare gradients with finite differences along random directions, for arrays with many elements."""
        names, rng = list(names), np.random.default_rng(0)
        if self.setting.dtype != "float64":
            cotangent = rng.standard_normal(self.expected(case).shape)
            self._gradients_within_budget(self._implementation_gradients(cotangent, case, names), cotangent, case)
            return
        inputs = {name: array for name, array in case.arrays().items() if name in names}
        try:
            check_vjp(
                lambda **arrays: self.got(case.with_arrays(arrays)),
                lambda cotangent, **arrays: self._implementation_gradients(cotangent, case.with_arrays(arrays), names),
                inputs,
                rng,
                step=step,
                tolerance=SLOPE_TOLERANCE,
            )
        except WrongGradient as error:
            raise Mismatch(f"gradient of {error}") from None

    def _implementation_gradients(self, cotangent: Array, case: Case, names: Iterable[str]) -> dict[str, Array]:
        """Return the implementation's gradients of the named arrays."""
        try:
            grads = self.gradients(self.implementation, cotangent.astype(self.setting.dtype), self.cast(case))
        except (Exception, SystemExit) as error:
            raise Mismatch(f"its gradient raised {type(error).__name__}: {error}") from error
        missing = [name for name in names if name not in grads]
        if missing:
            raise Mismatch(f"it returned no gradient of {', '.join(missing)}")
        return {name: grads[name] for name in names}

    def _gradients_within_budget(self, grads: Mapping[str, Array], cotangent: Array, case: Case) -> None:
        rounded, dtype = self.cast(case), self.setting.dtype
        exact = self.gradients(
            self.op.reference, cotangent.astype(dtype).astype(np.float64), self.cast(case, np.float64)
        )
        yardstick = self.gradients(self.op.reference, cotangent.astype(dtype), rounded)
        for name, grad in grads.items():
            self.require_within_budget(grad, exact[name], yardstick[name], f"gradient of {name}: ")


def gradients_by_name(returned: Any, names: list[str]) -> dict[str, Array]:
    """Return gradients by name: from a mapping, a sequence in the order of the arguments, or a single array.

    The gradient of a dict is a dict. Its entries are named ``argument.name``, as in `Case.arrays`.
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
