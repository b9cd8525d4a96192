"""From what people have to what the kit runs: a function, a class, an instance or a module with known names."""

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
from .subject import Implementation, Subject
from .subjects import SUBJECTS


def load(name: str) -> Any:
    """Import ``package.module:object``, ``package.module`` or ``package.module:object.attribute``.

    Raises:
        ValueError: if there is no such object, or its module cannot be imported.
    """
    module_name, _, path = name.partition(":")
    if not all(module_name.split(".")):
        raise ValueError(f"TARGET: expected package.module:object, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a file here can be named
    try:
        found: Any = importlib.import_module(module_name)
    except MissingPackageError:
        raise  # it says what to install
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            plain = module_name.removesuffix(".py").replace("/", ".")
            hint = "" if plain == module_name else f"; a file is named like a module: {plain}"
            raise ValueError(f"TARGET: expected package.module:object, found no module {error.name!r}{hint}") from error
        raise ValueError(f"TARGET: importing {module_name} raised {_told(error)}") from error
    for attribute in path.split(".") if path else ():
        if not hasattr(found, attribute):
            raise ValueError(f"TARGET: {module_name} has no {path!r}")
        found = getattr(found, attribute)
    return found


def _told(error: Exception) -> str:
    """Return an exception as a line, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    # A syntax error says so itself; the other two are not where the mistake is.
    told = isinstance(error, SyntaxError) or place.filename.startswith("<frozen") or place.filename == __file__
    return f"{type(error).__name__}: {error}" + ("" if told else f" ({place.filename}, line {place.lineno})")


def owner_of(name: str) -> Any:
    """Return the module or the object that a name is an attribute of; a module itself."""
    module_name, _, path = name.partition(":")
    parent = path.rpartition(".")[0]
    return load(f"{module_name}:{parent}" if parent else module_name)


def implementations(
    target: Any, name: str, only: Sequence[str] = (), owner: Any = None
) -> list[tuple[Subject, Implementation]]:
    """Return what a target implements: each subject with its functions.

    A function serves the subject that its name belongs to, or the one that is asked for. A class is called without
    arguments. An instance or a module serves every subject whose function it has. Its gradient is ``function.vjp``, or
    ``<function>_vjp`` beside it.

    Args:
        name: ``package.module:object``, for the report.
        only: names of subjects; empty for all that are there.
        owner: what a function lies in, with its gradient beside it.

    Raises:
        ValueError: if nothing is found, or what was asked for is missing; it says which names are looked for.
    """
    wanted = [subject_named(each) for each in only] or list(SUBJECTS)
    if inspect.isclass(target):
        target, name = _made(target, name), f"{name}()"
    if inspect.isroutine(target) or (callable(target) and not any(hasattr(target, each.function) for each in wanted)):
        return [_single(target, name, wanted, owner, chosen=bool(only))]
    found = [
        (subject, implementation_of(subject, getattr(target, subject.function), target, _path(name, subject.function)))
        for subject in wanted
        if hasattr(target, subject.function)
    ]
    missing = [subject for subject in wanted if not hasattr(target, subject.function)]
    if not found or (only and missing):
        raise ValueError(f"TARGET: {name} has none of the functions looked for:\n{_looked_for(missing)}")
    return found


def _made(kind: type, name: str) -> Any:
    try:
        return kind()
    except Exception as error:
        raise ValueError(
            f"TARGET: {name} is a class, which is called without arguments; that raised {_told(error)}. "
            "Name an instance, or a function that has what it needs"
        ) from error


def _single(
    target: Any, name: str, wanted: Sequence[Subject], owner: Any, *, chosen: bool
) -> tuple[Subject, Implementation]:
    own = getattr(target, "__name__", "")
    subjects = [subject for subject in wanted if subject.function == own] or (list(wanted) if chosen else [])
    if len(subjects) != 1:
        names = ", ".join(subject.name for subject in SUBJECTS)
        raise ValueError(
            f"TARGET: which subject does the function {own!r} implement? Name one with --subject ({names}), or call "
            f"the function by one of the protocol's names:\n{_looked_for(wanted)}"
        )
    return subjects[0], implementation_of(subjects[0], target, owner, name)


def implementation_of(subject: Subject, forward: Any, owner: Any, name: str) -> Implementation:
    """Return a function and its gradient as an implementation; what they take by name only, they are given by name."""
    called = name.rpartition(":")[2].rpartition(".")[2]
    vjp = getattr(forward, "vjp", None) or getattr(owner, f"{called}_vjp", None)
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):  # written in another language
        parameters = MappingProxyType({})
    keywords = [
        argument.name
        for argument in subject.arguments
        if argument.name in parameters and parameters[argument.name].kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return Implementation(name, forward, vjp, "convention" in parameters, keywords)


def _path(name: str, function: str) -> str:
    return f"{name}.{function}" if ":" in name else f"{name}:{function}"


def subject_named(name: str) -> Subject:
    """Return a subject by name.

    Raises:
        ValueError: if there is none.
    """
    for subject in SUBJECTS:
        if subject.name == name:
            return subject
    raise ValueError(f"--subject: expected one of {', '.join(subject.name for subject in SUBJECTS)}, got {name!r}")


def listing(subjects: Sequence[Subject]) -> str:
    """Return the functions of subjects with what they take and return, for people who write one."""
    lines = []
    for subject in subjects:
        lines.append(_signature(subject))
        rows = [
            (argument.name, f"({', '.join(argument.axes)})" if argument.axes else "", argument.words)
            for argument in subject.arguments
        ]
        names, axes = (max(len(row[column]) for row in rows) for column in range(2))
        for name, shape, words in rows:
            line = f"      {name:<{names}}  {shape:<{axes}}  "
            lines.append(line + words.replace("\n", "\n" + " " * len(line)))
        if subject.differentiable:
            given, returned = (", ".join(names) for names in (subject.names, subject.differentiable))
            lines.append(f"      its gradient: {subject.function}_vjp(cotangent, {given}) -> ({returned})")
        if subject.conventional:
            lines.append("      both may take convention=, a dat_ref.Convention; else the one that it follows is found")
    return "\n".join(lines)


def _signature(subject: Subject) -> str:
    return f"  {subject.signature} -> ({', '.join(subject.returns)}): {subject.title}"


def _looked_for(subjects: Sequence[Subject]) -> str:
    """The listing of one subject; of several only what they are called, and where the rest is told."""
    if len(subjects) == 1:
        return listing(subjects)
    return "\n".join([*map(_signature, subjects), "`dat-ref check --list` says what each argument is"])
