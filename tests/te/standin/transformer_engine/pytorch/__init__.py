from transformer_engine.pytorch import distributed, quantization, tensor
from transformer_engine.pytorch.modules import (
    DotProductAttention,
    GroupedLinear,
    LayerNormLinear,
    Linear,
    RMSNorm,
)
from transformer_engine.pytorch.quantization import fp8_autocast, fp8_model_init

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8_autocast",
    "fp8_model_init",
    "quantization",
    "tensor",
]
