"""Megatron's torch_dist checkpoints: where they lie, reading, writing, comparing."""
