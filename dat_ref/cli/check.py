"""``dat-ref check``: check the properties of an implementation, and diagnose its mistakes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import ConfigError
from ..conventions import Convention
from .output import HelpFormatter

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
        "instance or a module with functions of the protocol's names. Exit code 0 if all checks pass, 1 if one fails, "
        "2 if there is nothing to check.",
        epilog="example:\n  dat-ref check my_package.sampling:bilinear_sample --op sampler --dtype float32",
        formatter_class=HelpFormatter,
    )
    target = parser.add_argument_group("implementation")
    target.add_argument("target", nargs="?", metavar="TARGET", help="package.module:object; the module is imported")
    target.add_argument(
        "--op",
        action="append",
        default=[],
        metavar="NAME",
        help="operation, see --list; repeatable (default: all found)",
    )
    target.add_argument("--subject", dest="op", action="append", default=[], help=argparse.SUPPRESS)  # name in 0.1
    target.add_argument(
        "--list", action="store_true", help="print the operations, their functions and checks, and exit"
    )
    checks = parser.add_argument_group("checks")
    names = [convention.name.lower() for convention in Convention]
    checks.add_argument(
        "--convention",
        choices=[AUTO, *names],
        default=AUTO,
        help="convention of the expected values; auto: the one that the implementation follows (default: auto)",
    )
    checks.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="dtype of the arguments (default: float64)")
    checks.add_argument(
        "--max-examples", type=int, default=50, metavar="N", help="random cases for each check (default: 50)"
    )
    checks.add_argument(
        "--xfails", type=Path, metavar="FILE", help="checks that are expected to fail, one `name  # why` per line"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return 1 if a check fails, or passes although it is expected to fail."""
    _require_hypothesis()
    from ..testing import OPS, Setting, Stage, check_op, format_report
    from ..testing.kit import find_ops, settings_for
    from ..testing.target import op_by_name

    if options.list:
        chosen = [op_by_name(name) for name in options.op] or list(OPS)
        print("\n\n".join(format_op(op) for op in chosen))
        return 0
    if options.target is None:
        raise ValueError("TARGET: expected package.module:object (or --list)")
    if options.max_examples < 1:
        raise ValueError(f"--max-examples: expected at least 1, got {options.max_examples}")
    expected = _read_expected_failures(options.xfails) if options.xfails else {}
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


def _read_expected_failures(path: Path) -> dict[str, str]:
    from ..testing.kit import read_expected_failures

    try:
        return read_expected_failures(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--xfails: expected a text file in UTF-8, cannot read {path}: {error}") from error


def _require_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise ConfigError("hypothesis is needed to draw cases: pip install 'dat-ref[testing]'") from error


def format_op(op: OpSpec) -> str:
    """Return the description of an operation's function and its checks, for authors of an implementation."""
    from ..testing.target import format_signatures

    longest = max(len(check.name) for check in op.checks)
    lines = [f"{op.name}", format_signatures([op])]
    lines += [f"  {check.stage.value:<11}{check.name:<{longest}}  {check.property}" for check in op.checks]
    return "\n".join(lines)


def other_convention(implementation: Implementation, op: OpSpec, setting: Setting) -> str:
    """Return a hint if an implementation is correct under another convention than the selected one, else ``""``."""
    from ..testing.convention_match import infer_convention

    if not op.depends_on_convention or implementation.takes_convention:
        return ""
    match = infer_convention(implementation, op, setting)
    return (
        f"{describe_convention(op, match)}: try --convention {match.convention.name.lower()}\n\n" if match.exact else ""
    )


def describe_convention(op: OpSpec, match: ConventionMatch) -> str:
    """Return a line that names the convention of an implementation."""
    if match.exact:
        return f"{op.name} follows {match.label}"
    return f"{op.name}: no convention matches; closest: {match.convention.name} ({match.description})"
