"""Hugging Face folders to torch_dist checkpoints and back, streamed and verified."""

import megatron_espo.startup  # noqa: F401  before any module that imports Megatron
