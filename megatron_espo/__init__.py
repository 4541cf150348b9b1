"""Masked-diffusion language models on Megatron-Core: pre-training, fine-tuning and ESPO."""

import warnings

__version__ = "0.1.0"

# Megatron warns a dozen times at import that optional GPU packages are missing. Without a GPU that
# is as it should be; with one, the start-up check of the arguments says so in one sentence.
for _message in ("Transformer Engine and Apex", "Apex is not installed", "Only transformer-engine"):
    warnings.filterwarnings("ignore", message=_message)
