"""Flags that take several values."""

OPTIONAL_INTS = {"argparse_meta": {"type": int, "nargs": "+"}}
STRINGS = {"argparse_meta": {"type": str, "nargs": "+"}}
