"""The mathematics of masked diffusion: plain functions on tensors, no process groups."""
