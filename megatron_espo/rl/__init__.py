"""Reinforcement learning with sequence-level ELBO ratios (ESPO)."""
