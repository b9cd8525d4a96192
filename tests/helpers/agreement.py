"""When two arrays agree: the kit's rules."""

from dat_ref.testing.agreement import assert_agree, assert_within_budget

__all__ = ["assert_agree", "assert_within_budget"]
