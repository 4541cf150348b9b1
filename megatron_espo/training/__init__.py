"""The trainings: ``python -m megatron_espo.training.espo`` and ``.pretrain`` (SFT as well)."""

import megatron_espo.startup  # noqa: F401  before any module that imports Megatron
