"""LoRA adapters (arXiv 2106.09685) on Megatron's packed projections, in every layout."""
