"""``--dry-run``: a run on paper, or simulated on GPUs that are not there."""
