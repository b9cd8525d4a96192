"""The conformance kit: point it at any implementation, and it says which properties hold and what is wrong.

    >>> from dat_ref.testing import check
    >>> (report,) = check("dat_ref.ops.sampling:bilinear_sample", max_examples=5)
    >>> report.passed, report.results[3].check.property
    (True, 'Position (0, 0) is the center of the first pixel.')

==========================  ====================================================================================
`dat_ref.testing.ops`       what can be judged: one file for each operation
`dat_ref.testing.op_spec`   what the kit is made of: case, check, mutant, operation, implementation
`dat_ref.testing.context`   one implementation under one setting, compared with the spec
`dat_ref.testing.run`       the checks, in order, with the smallest counter-example
`dat_ref.testing.diagnosis` the mistake by name: the mutant that behaves the same
`dat_ref.testing.layout`    other layouts, single images: wrappers for what does not fit the protocol as it is
`dat_ref.testing.report`    the report for people
`dat_ref.testing.pytest`    the same in other people's suites: one test for each check
==========================  ====================================================================================

An implementation is a function of NumPy arrays under the protocol's name, or an object with several of them;
``<name>_vjp(cotangent, *arguments)`` beside it is its gradient. ``dat-ref check --list`` prints the names.
"""

from .._deprecation import deprecated_names
from .agreement import assert_agree, assert_within_budget, over_budget
from .kit import check, find_ops
from .layout import with_layout
from .op_spec import Argument, Case, Check, Implementation, Mismatch, Mutant, OpSpec, Setting, Skip, Stage
from .ops import OPS
from .report import format_report
from .run import Report, Result, check_op
from .torch import from_torch

__all__ = [
    "OPS",
    "Argument",
    "Case",
    "Check",
    "Implementation",
    "Mismatch",
    "Mutant",
    "OpSpec",
    "Report",
    "Result",
    "Setting",
    "Skip",
    "Stage",
    "assert_agree",
    "assert_within_budget",
    "check",
    "check_op",
    "find_ops",
    "format_report",
    "from_torch",
    "over_budget",
    "with_layout",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "SUBJECTS": "OPS",
        "Subject": "OpSpec",
        "check_subject": "check_op",
        "choose": "find_ops",
        "text": "format_report",
    },
)
