"""Implementations from a target: a function, a class, an instance or a module with the protocol's names."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from .adapters import MissingPackageError
from .op_spec import Implementation, OpSpec
from .ops import OPS


def load(name: str) -> Any:
    """Import ``package.module:object``, ``package.module`` or ``package.module:object.attribute``.

    Raises:
        ValueError: if the object does not exist or its module cannot be imported.
    """
    module_name, _, path = name.partition(":")
    if not all(module_name.split(".")):
        raise ValueError(f"TARGET: expected package.module:object, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a file in this folder can be imported
    try:
        found: Any = importlib.import_module(module_name)
    except MissingPackageError:
        raise  # its message names the package to install
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            plain = module_name.removesuffix(".py").replace("/", ".")
            hint = "" if plain == module_name else f"; use the module name of a file: {plain}"
            raise ValueError(f"TARGET: expected package.module:object, found no module {error.name!r}{hint}") from error
        raise ValueError(f"TARGET: importing {module_name} raised {_describe_error(error)}") from error
    for attribute in path.split(".") if path else ():
        if not hasattr(found, attribute):
            raise ValueError(f"TARGET: {module_name} has no {path!r}")
        found = getattr(found, attribute)
    return found


def _describe_error(error: Exception) -> str:
    """Return an exception in one line, with the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # A syntax error names its file; the importer and this file are not the location of the mistake.
    self_explanatory = (
        isinstance(error, SyntaxError) or frame.filename.startswith("<frozen") or frame.filename == __file__
    )
    return f"{type(error).__name__}: {error}" + (
        "" if self_explanatory else f" ({frame.filename}, line {frame.lineno})"
    )


def owner_of(name: str) -> Any:
    """Return the module or the object that has the named attribute; for a module the module itself."""
    module_name, _, path = name.partition(":")
    parent = path.rpartition(".")[0]
    return load(f"{module_name}:{parent}" if parent else module_name)


def find_implementations(
    target: Any, name: str, only: Sequence[str] = (), owner: Any = None
) -> list[tuple[OpSpec, Implementation]]:
    """Return the operations that a target implements.

    A function implements the operation with its name, or the one in `only`. A class is called without arguments. An
    instance or a module implements all operations whose functions it has. The gradient is ``function.vjp``, or
    ``<function>_vjp`` in the same object.

    Args:
        target: the object.
        name: ``package.module:object``, for the report.
        only: names of operations; empty for all that the target has.
        owner: module or object that contains a function and its gradient.

    Raises:
        ValueError: if no function is found or a requested one is missing; the message lists the expected names.
    """
    candidates = [op_by_name(each) for each in only] or list(OPS)
    if inspect.isclass(target):
        target, name = _instantiate(target, name), f"{name}()"
    if inspect.isroutine(target) or (
        callable(target) and not any(hasattr(target, each.function) for each in candidates)
    ):
        return [_single_function(target, name, candidates, owner, chosen=bool(only))]
    found = [
        (op, implementation_of(op, getattr(target, op.function), target, _qualified_name(name, op.function)))
        for op in candidates
        if hasattr(target, op.function)
    ]
    missing = [op for op in candidates if not hasattr(target, op.function)]
    if not found or (only and missing):
        raise ValueError(f"TARGET: {name} has none of the expected functions:\n{_format_candidates(missing)}")
    return found


def _instantiate(kind: type, name: str) -> Any:
    try:
        return kind()
    except Exception as error:
        raise ValueError(
            f"TARGET: {name} is a class; calling it without arguments raised {_describe_error(error)}. "
            "Use an instance or a function instead"
        ) from error


def _single_function(
    target: Any, name: str, candidates: Sequence[OpSpec], owner: Any, *, chosen: bool
) -> tuple[OpSpec, Implementation]:
    function_name = getattr(target, "__name__", "")
    ops = [op for op in candidates if op.function == function_name] or (list(candidates) if chosen else [])
    if len(ops) != 1:
        names = ", ".join(op.name for op in OPS)
        raise ValueError(
            f"TARGET: unknown operation of the function {function_name!r}. Select one with --op "
            f"({names}), or use one of the protocol's names:\n{_format_candidates(candidates)}"
        )
    return ops[0], implementation_of(ops[0], target, owner, name)


def implementation_of(op: OpSpec, forward: Any, owner: Any, name: str) -> Implementation:
    """Return a function and its gradient as an implementation, with its keyword-only arguments."""
    function_name = name.rpartition(":")[2].rpartition(".")[2]
    vjp = getattr(forward, "vjp", None) or getattr(owner, f"{function_name}_vjp", None)
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):  # written in another language
        parameters = MappingProxyType({})
    keywords = [
        argument.name
        for argument in op.arguments
        if argument.name in parameters and parameters[argument.name].kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return Implementation(name, forward, vjp, "convention" in parameters, keywords)


def _qualified_name(name: str, function: str) -> str:
    return f"{name}.{function}" if ":" in name else f"{name}:{function}"


def op_by_name(name: str) -> OpSpec:
    """Return an operation by name.

    Raises:
        ValueError: if there is none.
    """
    for op in OPS:
        if op.name == name:
            return op
    raise ValueError(f"--op: expected one of {', '.join(op.name for op in OPS)}, got {name!r}")


def format_signatures(ops: Sequence[OpSpec]) -> str:
    """Return the signatures of operations, with descriptions of the arguments, as help for users."""
    lines = []
    for op in ops:
        lines.append(_signature(op))
        rows = [
            (argument.name, f"({', '.join(argument.axes)})" if argument.axes else "", argument.description)
            for argument in op.arguments
        ]
        names, axes = (max(len(row[column]) for row in rows) for column in range(2))
        for name, shape, description in rows:
            line = f"      {name:<{names}}  {shape:<{axes}}  "
            lines.append(line + description.replace("\n", "\n" + " " * len(line)))
        if op.differentiable_arguments:
            given, returned = (", ".join(names) for names in (op.argument_names, op.differentiable_arguments))
            lines.append(f"      its gradient: {op.function}_vjp(cotangent, {given}) -> ({returned})")
        if op.depends_on_convention:
            lines.append("      both may take convention=, a dat_ref.Convention; otherwise the convention is inferred")
    return "\n".join(lines)


def _signature(op: OpSpec) -> str:
    return f"  {op.signature} -> ({', '.join(op.returns)}): {op.title}"


def _format_candidates(ops: Sequence[OpSpec]) -> str:
    """Return the full description of a single operation, or the signatures of several."""
    if len(ops) == 1:
        return format_signatures(ops)
    return "\n".join([*map(_signature, ops), "`dat-ref check --list` describes the arguments"])
