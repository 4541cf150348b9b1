"""Masked-diffusion language models on Megatron-Core: pre-training, fine-tuning and ESPO."""

__version__ = "0.1.0"
