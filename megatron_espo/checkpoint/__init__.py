"""Checkpoints: reading, comparing."""
