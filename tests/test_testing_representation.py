"""Short representations: drawn cases and operations are printed by shape and by name, not by element."""

import warnings

import numpy as np
from hypothesis.errors import HypothesisWarning
from hypothesis.internal.reflection import repr_call
from hypothesis.vendor.pretty import pretty
from strategies import Drawn

from dat_ref.testing.kit import OPS
from dat_ref.testing.op_spec import Case

LARGE = {"x": np.zeros((2, 3, 19, 23)) + 1 / 3, "options": [{"weight": np.zeros((5, 7), np.float32)}], "stride": (1,)}
SHAPES = "{'x': <float64 (2, 3, 19, 23)>, 'options': [{'weight': <float32 (5, 7)>}], 'stride': (1,)}"


def test_arrays_are_shown_by_shape():
    assert repr(Case(LARGE, "large")) == f"Case({SHAPES}, name='large')"
    drawn = Drawn((LARGE, 3))
    assert pretty(drawn) == repr(drawn) == f"({SHAPES}, 3)"
    arguments, count = drawn  # still a tuple
    assert arguments is LARGE
    assert count == 3


def test_operations_and_their_cases_raise_no_warning_of_hypothesis():
    with warnings.catch_warnings():
        warnings.simplefilter("error", HypothesisWarning)
        for op in OPS:
            assert repr(op) == f"OpSpec({op.name!r})"
            cases = [Drawn((LARGE, LARGE))] * 20
            assert len(repr_call(holds, (op, *op.checks, *cases), {})) < 10_000


def holds(*subjects):
    """Stand for a test whose arguments are printed."""
