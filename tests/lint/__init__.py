"""Checks of the sources that ruff does not have."""
