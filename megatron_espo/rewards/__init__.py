"""Scores completions in processes that are replaced when they hang or die."""
