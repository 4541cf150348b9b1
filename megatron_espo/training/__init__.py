"""The trainings: ``python -m megatron_espo.training.espo`` and ``.pretrain`` (SFT as well)."""
