"""Helpers of several test modules; `tests` is on the import path, so `from helpers... import ...`."""
