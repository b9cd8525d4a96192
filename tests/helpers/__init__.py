"""Helpers that several test modules share; `tests` is on the import path, so `from helpers... import ...`."""
