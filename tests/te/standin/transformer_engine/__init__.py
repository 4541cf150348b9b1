"""A stand-in for Transformer Engine on a CPU: its constructors, its FP8 rounding, its weight cache.

It has what Megatron's GPT layers call. Calls are checked against the recorded parameters of the
real package. Linear layers round to FP8 as the recipe says (values; gradients are not rounded),
keep their FP8 weights as the real ones do, refuse shapes that the real ones refuse, and gather,
scatter and sum over the tensor-parallel ranks.
"""

from transformer_engine import common, pytorch
from transformer_engine.signatures import VERSION as __version__

__all__ = ["__version__", "common", "pytorch"]
