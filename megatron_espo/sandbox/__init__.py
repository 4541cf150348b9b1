"""Runs generated code where it can neither harm nor cheat."""
