"""Hugging Face folders to torch_dist checkpoints and back, streamed and verified."""
