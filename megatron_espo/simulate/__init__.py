"""Runs a real job as one or several of its ranks on GPUs that are not there (``--simulate``)."""
