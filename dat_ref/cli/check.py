"""``dat-ref check``: which properties an implementation has, and what is wrong where it does not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import ConfigError
from ..conventions import Convention

if TYPE_CHECKING:
    from ..testing import Implementation, OpSpec, Setting
    from ..testing.convention_match import ConventionMatch

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
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="repeatable; see --list")
    parser.add_argument("--subject", dest="op", action="append", default=[], help=argparse.SUPPRESS)  # its name in 0.1
    names = [convention.name.lower() for convention in Convention]
    parser.add_argument(
        "--convention", choices=[AUTO, *names], default=AUTO, help="whose geometry is right (auto: find)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the arrays handed over")
    parser.add_argument("--max-examples", type=int, default=50, metavar="N", help="cases drawn for each check")
    parser.add_argument("--xfails", type=Path, metavar="FILE", help="checks that are known to fail: `name  # why`")
    parser.add_argument("--list", action="store_true", help="print the operations, their functions and checks")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if a check does not hold, or holds against expectation."""
    _require_hypothesis()
    from ..testing import OPS, Setting, Stage, check_op, find_ops, format_report
    from ..testing.kit import read_expected_failures, settings_for
    from ..testing.target import op_by_name

    if options.list:
        chosen = [op_by_name(name) for name in options.op] or list(OPS)
        print("\n\n".join(format_op(op) for op in chosen))
        return 0
    if options.target is None:
        raise ValueError("TARGET: expected package.module:object (or --list)")
    if options.max_examples < 1:
        raise ValueError(f"--max-examples: expected at least 1, got {options.max_examples}")
    expected = read_expected_failures(options.xfails) if options.xfails else {}
    convention = None if options.convention == AUTO else Convention[options.convention.upper()]
    setting = Setting(dtype=options.dtype, max_examples=options.max_examples)
    passed = True
    for op, implementation in find_ops(options.target, options.op):
        for each, match in settings_for(implementation, op, convention, setting):
            if match is not None:
                print(describe_convention(op, match))
            report = check_op(implementation, op, each, expected)
            print(format_report(report), end="\n\n")
            if convention is not None and report.failed(Stage.VALUES):
                print(other_convention(implementation, op, each), end="")
            passed = passed and report.passed
    return 0 if passed else 1


def _require_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise ConfigError("hypothesis is needed to draw cases: pip install 'dat-ref[testing]'") from error


def format_op(op: OpSpec) -> str:
    """Return an operation's function and its checks, for people who write one."""
    from ..testing.target import format_signatures

    longest = max(len(check.name) for check in op.checks)
    lines = [f"{op.name}", format_signatures([op])]
    lines += [f"  {check.stage.value:<11}{check.name:<{longest}}  {check.property}" for check in op.checks]
    return "\n".join(lines)


def other_convention(implementation: Implementation, op: OpSpec, setting: Setting) -> str:
    """Say that an implementation is right under another convention than the one asked for, if it is."""
    from ..testing.convention_match import infer_convention

    if not op.depends_on_convention or implementation.takes_convention:
        return ""
    match = infer_convention(implementation, op, setting)
    return (
        f"{describe_convention(op, match)}: try --convention {match.convention.name.lower()}\n\n" if match.exact else ""
    )


def describe_convention(op: OpSpec, match: ConventionMatch) -> str:
    """Say which convention an implementation follows."""
    if match.exact:
        return f"{op.name} follows {match.label}"
    return f"{op.name} follows none of the conventions; nearest is {match.convention.name}: {match.description}"
