"""Operation counter of the NumPy spec: multiply-adds, gathers, and bytes of memory, measured during execution.

Inside `counting`, every array of the spec is a `CountingArray`, an `ndarray` subclass that observes each operation. The
counter uses no formula, and the spec contains no counting code. Three rules define the counts.

1. A **multiply-add** is a product that is added to a sum. NumPy code has three forms of it: a contraction (`a @ b`,
   `einsum`, `tensordot`; one per product), ``sum += a * b`` (one per element; depthwise convolution and bilinear
   sampling use this form), and ``(a * b).sum()``. Products that are not summed (scales, norms, GELU, softmax) are not
   counted, as in the articles.
2. A **gather** reads a value through an index array that depends on the data: on the input or on the parameters.
3. A **lookup** reads a value through an index array that does not depend on the data. Windows, neighborhoods, and
   tables at integer displacements are read in this way. Slices could replace a lookup.

Each count is recorded under the names of the spec functions on the call stack, so totals can be split by function.
"""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from .._checks import Array, Tree
from ..params import map_tree

Path = tuple[str, ...]  # names of running functions of the spec, outermost first

PACKAGE = __name__.split(".", maxsplit=1)[0]
# Modules of the package outside the spec; their operations are not counted.
NOT_THE_SPEC = ("complexity", "torch", "viz", "cli", "testing", "data")
# NumPy functions whose result depends only on the shapes of their arguments, not on the values.
SHAPE_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "shape", "ndim", "size", "result_type"}
# Operations that multiply and add but have no counting rule. They raise an error, so no count is silently too low.
UNSUPPORTED = {"dot", "vdot", "inner", "outer", "kron", "convolve", "correlate", "cross", "interp", "trapezoid"}


@dataclass
class Counts:
    """Operations executed inside `counting`, by call path."""

    macs_by_path: Counter[Path] = field(default_factory=Counter)
    gathers_by_path: Counter[Path] = field(default_factory=Counter)
    lookups_by_path: Counter[Path] = field(default_factory=Counter)

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.macs_by_path.total()

    @property
    def gathers(self) -> int:
        """Values read at addresses that depend on the data."""
        return self.gathers_by_path.total()

    @property
    def lookups(self) -> int:
        """Values read through indices that do not depend on the data."""
        return self.lookups_by_path.total()

    def within(self, *names: str) -> Counts:
        """Return the counts from calls of any of these functions.

        >>> counts = Counts(Counter({("layer", "linear"): 3, ("layer", "attend"): 4}))
        >>> counts.within("attend").macs
        4
        """
        return Counts(
            *(
                Counter({path: amount for path, amount in counter.items() if set(names) & set(path)})
                for counter in (self.macs_by_path, self.gathers_by_path, self.lookups_by_path)
            )
        )


# ------------------------------------------------------------------------------------------------ the counting array


class CountingArray(np.ndarray):
    """Array that records its operations in the active `Counts`."""

    data_dependent: bool  # whether values depend on the input or the parameters, not only on shapes
    product: bool  # whether each element is an unsummed product; summing it makes a multiply-add

    def __array_finalize__(self, parent: Any) -> None:
        self.data_dependent = getattr(parent, "data_dependent", False)
        self.product = getattr(parent, "product", False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        out = kwargs.get("out", ())
        if out:
            kwargs["out"] = tuple(_unwrap(array) for array in out)
        result = getattr(ufunc, method)(*map(_unwrap, inputs), **kwargs)
        if ufunc.signature is not None:
            _record("macs_by_path", _contraction(ufunc, inputs))
        elif ufunc is np.add and (summed := _summed_products(method, inputs, out)):
            _record("macs_by_path", summed)
        return _as_counting(
            result,
            out,
            data_dependent=any(_is_data_dependent(array) for array in inputs),
            product=ufunc is np.multiply and method == "__call__",
        )

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        name = function.__name__
        module = getattr(function, "__module__", "") or ""
        if name in UNSUPPORTED or "linalg" in module or "fft" in module:
            raise NotImplementedError(f"counting: no rule for {module}.{name}")
        result = function(*_unwrap(list(args)), **_unwrap(kwargs))
        if name == "einsum":
            _record("macs_by_path", _einsum(*args))
        elif name == "tensordot":
            _record("macs_by_path", _tensordot(result, *args, **kwargs))
        data_dependent = name not in SHAPE_ONLY and (
            _is_data_dependent(list(args)) or _is_data_dependent(list(kwargs.values()))
        )
        if name in ("take", "take_along_axis", "choose", "compress", "extract"):
            _record_reads(
                result, data_dependent=_is_data_dependent(list(args[1:])) or _is_data_dependent(list(kwargs.values()))
            )
        return _as_counting(result, (), data_dependent=data_dependent, product=False)

    def __getitem__(self, key: Any) -> Any:
        parts = key if isinstance(key, tuple) else (key,)
        indices = [part for part in parts if isinstance(part, (np.ndarray, list))]
        value = super().__getitem__(_unwrap(key))
        if indices:
            _record_reads(value, data_dependent=_is_data_dependent(indices))
            if isinstance(value, CountingArray):
                value.data_dependent = value.data_dependent or _is_data_dependent(indices)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_unwrap(key), _unwrap(value))
        self.data_dependent = self.data_dependent or _is_data_dependent(value)
        self.product = False

    def take(self, *args: Any, **kwargs: Any) -> Any:
        return np.take(self, *args, **kwargs)

    def dot(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("counting: no rule for ndarray.dot; use @")


def _unwrap(value: Any) -> Any:
    """Return arrays as plain arrays, also inside nested lists, tuples and dicts."""
    if isinstance(value, CountingArray):
        return value.view(np.ndarray)
    if isinstance(value, (list, tuple)):
        plain = [_unwrap(item) for item in value]
        return plain if isinstance(value, list) else tuple(plain)
    if isinstance(value, dict):
        return {name: _unwrap(item) for name, item in value.items()}
    return value


def _as_counting(result: Any, out: tuple[Any, ...], *, data_dependent: bool, product: bool) -> Any:
    """Return a result as counting arrays with the given flags."""
    if isinstance(result, (list, tuple)):
        items = [_as_counting(item, (), data_dependent=data_dependent, product=product) for item in result]
        return items if isinstance(result, list) else tuple(items)
    if not isinstance(result, np.ndarray):
        return result
    if out:
        if isinstance(out[0], CountingArray):
            out[0].data_dependent, out[0].product = out[0].data_dependent or data_dependent, product
        return out[0]
    counted = result.view(CountingArray)
    counted.data_dependent, counted.product = data_dependent, product
    return counted


def _is_data_dependent(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_data_dependent(item) for item in value)
    return isinstance(value, CountingArray) and value.data_dependent


# ------------------------------------------------------------------------------------------------ the rules


def _contraction(ufunc: np.ufunc, inputs: tuple[Any, ...]) -> int:
    """Return the products of a matrix multiplication: rows · columns · inner length, times the batch of matrices."""
    if ufunc is not np.matmul:
        raise NotImplementedError(f"counting: no rule for numpy.{ufunc.__name__}")
    left, right = (np.shape(array) for array in inputs)
    rows, inner = (left[-2] if len(left) > 1 else 1), left[-1]
    columns = right[-1] if len(right) > 1 else 1
    return math.prod(np.broadcast_shapes(left[:-2], right[:-2])) * rows * inner * columns


def _einsum(subscripts: str, *operands: Any) -> int:
    """Return the products of a contraction of two operands: the product of all axis lengths."""
    inputs = subscripts.replace(" ", "").split("->")[0].split(",")
    if len(inputs) != 2 or "..." in subscripts:
        raise NotImplementedError(f"counting: no rule for einsum({subscripts!r})")
    lengths = {axis: length for axes, array in zip(inputs, operands) for axis, length in zip(axes, np.shape(array))}
    return math.prod(lengths.values())


def _tensordot(result: Any, left: Any, right: Any, axes: Any = 2) -> int:
    """Return the products of a contraction: the result's size times the lengths of the summed axes."""
    if isinstance(axes, int):
        summed = np.shape(left)[np.ndim(left) - axes :]
    else:
        summed = tuple(np.shape(left)[axis] for axis in np.atleast_1d(axes[0]))
    return np.size(result) * math.prod(summed)


def _summed_products(method: str, inputs: tuple[Any, ...], out: tuple[Any, ...]) -> int:
    """Return the number of products added to a sum: the right side of ``+=``, or the elements of ``.sum()``."""
    in_place = method == "__call__" and bool(out) and out[0] is inputs[0]
    summand = inputs[1] if in_place else inputs[0]
    if not (in_place or method == "reduce") or not (isinstance(summand, CountingArray) and summand.product):
        return 0
    summand.product = False  # counted once
    return int(summand.size)


def _record_reads(values: Any, *, data_dependent: bool) -> None:
    _record("gathers_by_path" if data_dependent else "lookups_by_path", int(np.size(values)))


# ------------------------------------------------------------------------------------------------ the context


_ACTIVE: list[Counts] = []


def _record(kind: str, amount: int) -> None:
    if _ACTIVE:
        getattr(_ACTIVE[-1], kind)[_call_path()] += amount


def _call_path() -> Path:
    """Return the names of the spec's functions on the call stack, outermost first."""
    names = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_spec(frame.f_globals.get("__name__", "")):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return tuple(reversed(names))


def _is_spec(module: str) -> bool:
    package, _, rest = module.partition(".")
    return package == PACKAGE and rest.split(".")[0] not in NOT_THE_SPEC


class _CountingNumPy:
    """Replacement of ``np`` in spec modules inside `counting`; its functions return counting arrays."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, (type, ModuleType, np.ufunc)) or not callable(value):
            return value
        if name in ("asarray", "ascontiguousarray"):
            # These return plain arrays; keep the data-dependence flag of their argument.
            return lambda array, *args, **kwargs: _as_counting(
                value(_unwrap(array), *args, **kwargs), (), data_dependent=_is_data_dependent(array), product=False
            )

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return (
                result
                if isinstance(result, CountingArray)
                else _as_counting(result, (), data_dependent=False, product=False)
            )

        return call


@contextmanager
def counting() -> Iterator[Counts]:
    """Count the operations of the spec inside this context.

    Only arrays returned by `mark_as_data`, and results computed from them, count as data-dependent. Use one thread: the
    counter records all calls of the spec in the process.

    >>> from dat_ref.ops.basic import linear
    >>> with counting() as counts:
    ...     y = linear(mark_as_data(np.ones((1, 3, 4))), mark_as_data(np.ones((2, 3))))
    >>> counts.macs
    24
    """
    modules = [
        module for name, module in list(sys.modules.items()) if _is_spec(name) and getattr(module, "np", None) is np
    ]
    counts = Counts()
    _ACTIVE.append(counts)
    for module in modules:
        module.np = _CountingNumPy()  # type: ignore[attr-defined]
    try:
        yield counts
    finally:
        for module in modules:
            module.np = np  # type: ignore[attr-defined]
        _ACTIVE.remove(counts)


def mark_as_data(tree: Tree) -> Tree:
    """Return a tree of arrays (or one array) marked as data: the input or the parameters."""

    def mark(leaf: Any) -> Any:
        counted = np.asarray(leaf).view(CountingArray)
        counted.data_dependent, counted.product = True, False
        return counted

    return map_tree(mark, tree)


def count(function: Callable[..., Any], x: Array, params: Tree, *args: Any, **kwargs: Any) -> Counts:
    """Run ``function(x, params, ...)``, for example `deformable_layer` or `block`, and return its counts."""
    with counting() as counts:
        function(mark_as_data(x), mark_as_data(params), *args, **kwargs)
    return counts


# ------------------------------------------------------------------------------------------------ memory


def retained_bytes(tree: Any, exclude: Any = ()) -> int:
    """Return the bytes of the distinct arrays in a tree or trace; views of one array count once.

    Args:
        tree: nested dataclasses, tuples, lists and dicts of arrays.
        exclude: tree of arrays that are not counted, for example the input and the parameters.
    """
    excluded = _owners(exclude)
    return sum(owner.nbytes for key, owner in _owners(tree).items() if key not in excluded)


def _owners(tree: Any) -> dict[int, Array]:
    """Return the arrays that own the memory of a tree, by `id`."""
    if isinstance(tree, np.ndarray):
        while isinstance(tree.base, np.ndarray):
            tree = tree.base
        return {id(tree): tree}
    if is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, entry.name) for entry in fields(tree)]
    if isinstance(tree, dict):
        tree = list(tree.values())
    owners: dict[int, Array] = {}
    if isinstance(tree, (list, tuple)):
        for branch in tree:
            owners.update(_owners(branch))
    return owners


class Allocation(NamedTuple):
    """Memory allocated by a call, in bytes, and its result."""

    peak: int  # largest allocation during the call, minus the allocation before it
    retained: int  # bytes still allocated when the call returns: its result
    result: Any


def measure_allocation(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Allocation:
    """Run a function and return its memory allocation as measured by tracemalloc.

    NumPy reports its allocations to tracemalloc, torch does not. The numbers include Python objects, so they are
    meaningful only for arrays that are much larger than these.
    """
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        start, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        result = function(*args, **kwargs)
        end, peak = tracemalloc.get_traced_memory()
    finally:
        if not was_tracing:
            tracemalloc.stop()
    return Allocation(peak - start, end - start, result)
