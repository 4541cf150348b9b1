"""The old name of the module, which Megatron still imports; deprecated as in the real package."""

import warnings

from transformer_engine.pytorch.quantization import (
    FP8GlobalStateManager,
    fp8_autocast,
    fp8_model_init,
)

__all__ = ["FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"]

warnings.warn("use transformer_engine.pytorch.quantization", DeprecationWarning, stacklevel=2)
