"""Masked-diffusion language models on Megatron-Core: pre-training, fine-tuning and ESPO."""

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_espo.api import Model, load

__all__ = ["Model", "load"]

__version__ = "0.2.0"

# Megatron warns a dozen times at import that optional GPU packages are missing. Without a GPU that
# is as it should be; with one, the start-up check of the arguments says so in one sentence.
# It says of parts that nothing here takes that they are experimental.
for _message in (
    "Transformer Engine and Apex", "Apex is not installed", "Only transformer-engine",
    r"\w+ is experimental and still under",
):  # fmt: skip
    warnings.filterwarnings("ignore", message=_message)


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is asked for: it brings PyTorch and Megatron."""
    if name in __all__:
        from megatron_espo import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
