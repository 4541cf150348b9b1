"""The commands that use a trained model, and the start scripts' part in Python."""

import megatron_espo.startup  # noqa: F401  before any module that imports Megatron
