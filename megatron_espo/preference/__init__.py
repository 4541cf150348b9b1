"""Learning from preference pairs, without rollouts: DPO with ELBOs."""
