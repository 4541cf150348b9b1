"""Completions by iterative unmasking."""
