"""Evaluation of a checkpoint on a task: protocols, resumable runs, statistics."""
