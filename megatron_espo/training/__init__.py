"""Entry points: pre-training, supervised fine-tuning and ESPO on Megatron's training stack."""
