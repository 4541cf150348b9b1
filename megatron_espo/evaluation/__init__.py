"""Evaluation on a task: problems, completing, scoring, protocols, resumable runs, statistics."""
