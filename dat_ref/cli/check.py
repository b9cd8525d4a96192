"""``dat-ref check``: which promises an implementation keeps, and what is wrong where it does not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import ConfigError
from ..conventions import Convention

if TYPE_CHECKING:
    from ..testing import Implementation, Setting, Subject
    from ..testing.conventions import Following

AUTO = "auto"
DTYPES = ("float64", "float32", "float16")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "check",
        help="check any implementation against the reference",
        description="Run the conformance checks on an implementation: a function of NumPy arrays, or a class, an "
        "instance or a module that has the functions looked for. Exit code 0 if no check fails, 1 if one does, 2 if "
        "there is nothing to check.",
    )
    parser.add_argument("target", nargs="?", metavar="TARGET", help="package.module:object")
    parser.add_argument("--subject", action="append", default=[], metavar="NAME", help="repeatable; see --list")
    names = [convention.name.lower() for convention in Convention]
    parser.add_argument(
        "--convention", choices=[AUTO, *names], default=AUTO, help="whose geometry is right (auto: find)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the arrays handed over")
    parser.add_argument("--max-examples", type=int, default=50, metavar="N", help="cases drawn for each check")
    parser.add_argument("--xfails", type=Path, metavar="FILE", help="checks that are known to fail: `name  # why`")
    parser.add_argument("--list", action="store_true", help="print the subjects, their functions and checks")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if a check does not hold, or holds against expectation."""
    _require_hypothesis()
    from ..testing import SUBJECTS, Setting, Stage, check_subject, choose, text
    from ..testing.kit import read_expected_failures, settings_for
    from ..testing.target import subject_named

    if options.list:
        chosen = [subject_named(name) for name in options.subject] or list(SUBJECTS)
        print("\n\n".join(described(subject) for subject in chosen))
        return 0
    if options.target is None:
        raise ValueError("TARGET: expected package.module:object (or --list)")
    if options.max_examples < 1:
        raise ValueError(f"--max-examples: expected at least 1, got {options.max_examples}")
    expected = read_expected_failures(options.xfails) if options.xfails else {}
    convention = None if options.convention == AUTO else Convention[options.convention.upper()]
    setting = Setting(dtype=options.dtype, max_examples=options.max_examples)
    passed = True
    for subject, implementation in choose(options.target, options.subject):
        for each, found in settings_for(implementation, subject, convention, setting):
            if found is not None:
                print(following(subject, found))
            report = check_subject(implementation, subject, each, expected)
            print(text(report), end="\n\n")
            if convention is not None and report.failed(Stage.VALUES):
                print(other_convention(implementation, subject, each), end="")
            passed = passed and report.passed
    return 0 if passed else 1


def _require_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise ConfigError("hypothesis is needed to draw cases: pip install 'dat-ref[testing]'") from error


def described(subject: Subject) -> str:
    """Return a subject's function and its checks, for people who write one."""
    from ..testing.target import listing

    longest = max(len(check.name) for check in subject.checks)
    lines = [f"{subject.name}", listing([subject])]
    lines += [f"  {check.stage.value:<11}{check.name:<{longest}}  {check.promise}" for check in subject.checks]
    return "\n".join(lines)


def other_convention(implementation: Implementation, subject: Subject, setting: Setting) -> str:
    """Say that an implementation is right under another convention than the one asked for, if it is."""
    from ..testing.conventions import follows

    if not subject.conventional or implementation.takes_convention:
        return ""
    found = follows(implementation, subject, setting)
    return f"{following(subject, found)}: try --convention {found.convention.name.lower()}\n\n" if found.exact else ""


def following(subject: Subject, found: Following) -> str:
    """Say which convention an implementation follows."""
    if found.exact:
        return f"{subject.name} follows {found.names}"
    return f"{subject.name} follows none of the conventions; nearest is {found.convention.name}: {found.words}"
