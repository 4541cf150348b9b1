"""Tokenizers, indexed pre-training data and fine-tuning data."""
