"""Conformance kit: checks any implementation of an operation, reports which properties hold, and diagnoses mistakes.

    >>> from dat_ref.testing import check
    >>> (report,) = check("dat_ref.ops.sampling:bilinear_sample", max_examples=5)
    >>> report.passed, report.results[3].check.property
    (True, 'Position (0, 0) is the center of the first pixel.')

==========================  ====================================================================================
`dat_ref.testing.ops`       operations that the kit can check, one file each
`dat_ref.testing.op_spec`   data types of the kit: case, check, mutant, operation, implementation
`dat_ref.testing.context`   one implementation under one setting, compared with the reference
`dat_ref.testing.run`       test runner; finds the smallest counter-example of each check
`dat_ref.testing.diagnosis` diagnosis: mutants that give the same results as the implementation
`dat_ref.testing.layout`    wrappers for implementations with other layouts, or for single images
`dat_ref.testing.report`    text report
`dat_ref.testing.pytest`    pytest integration: one test for each check
==========================  ====================================================================================

An implementation is a function of NumPy arrays with the protocol's name, or an object with several such functions.
Its gradient is ``<name>_vjp(cotangent, *arguments)`` in the same module or object. ``dat-ref check --list`` prints
the names.
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
