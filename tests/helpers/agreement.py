"""Agreement of two arrays: the rules of the conformance kit."""

from dat_ref.testing.agreement import assert_agree, assert_within_budget

__all__ = ["assert_agree", "assert_within_budget"]
