"""Masked-diffusion language models on Megatron-Core: pre-training, fine-tuning and ESPO."""

import warnings

__version__ = "0.1.0"

# Megatron warns a dozen times at import that optional GPU packages are missing. Without a GPU that
# is as it should be; with one, the start-up check of the arguments says so in one sentence.
# It says of parts that nothing here takes that they are experimental.
for _message in (
    "Transformer Engine and Apex", "Apex is not installed", "Only transformer-engine",
    r"\w+ is experimental and still under",
):  # fmt: skip
    warnings.filterwarnings("ignore", message=_message)
