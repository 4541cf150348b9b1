"""Models in Python, without torchrun and flags: load one, sample from it, score texts.

model = megatron_espo.load("GSAI-ML/LLaDA-8B-Instruct")
model.chat("What is the capital of France?")
"""

import megatron_espo.startup  # noqa: F401  as entry points do, before Megatron is imported
from megatron_espo.api.model import Likelihood, Model, Prompt, Sample, load

__all__ = ["Likelihood", "Model", "Prompt", "Sample", "load"]
