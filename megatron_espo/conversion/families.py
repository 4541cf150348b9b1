"""The model families whose Hugging Face checkpoints can be converted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_espo.conversion import (
    dream,
    illada,
    llada,
    llada2,
    llada_moe,
    llama3,
    qwen2,
    qwen3,
    sdar,
)
from megatron_espo.conversion.mapping import Names
from megatron_espo.errors import UserError
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape


@dataclass(frozen=True)
class Family:
    """What differs between families.

    Attributes:
        architecture: its name in config.json.
        names: the tensors' names.
        read_config: config.json -> shape.
        write_config: shape -> fields of config.json.
        tokenizer_class: transformers' own class for the tokenizer, where the published folder
            asks for code of its own.
        autoregressive: whether its models predict the next token and have no mask token; see
            conversion/autoregressive.py.
    """

    architecture: str
    names: Names
    read_config: Callable[[Config], ModelShape]
    write_config: Callable[[ModelShape], dict[str, Any]]
    tokenizer_class: str | None = None
    autoregressive: bool = False


FAMILIES = {
    "llada": Family(llada.ARCHITECTURE, llada.NAMES, llada.read_config, llada.write_config),
    "dream": Family(
        dream.ARCHITECTURE, dream.NAMES, dream.read_config, dream.write_config, "Qwen2Tokenizer"
    ),
    "illada": Family(illada.ARCHITECTURE, illada.NAMES, illada.read_config, illada.write_config),
    "sdar": Family(
        sdar.ARCHITECTURE, sdar.NAMES, sdar.read_config, sdar.write_config, "Qwen2Tokenizer"
    ),
    "llada2": Family(llada2.ARCHITECTURE, llada2.NAMES, llada2.read_config, llada2.write_config),
    "llada_moe": Family(
        llada_moe.ARCHITECTURE, llada_moe.NAMES, llada_moe.read_config, llada_moe.write_config
    ),
    "qwen3": Family(
        qwen3.ARCHITECTURE,
        qwen3.NAMES,
        qwen3.read_config,
        qwen3.write_config,
        autoregressive=True,
    ),
    "qwen2": Family(
        qwen2.ARCHITECTURE,
        qwen2.NAMES,
        qwen2.read_config,
        qwen2.write_config,
        autoregressive=True,
    ),
    "llama": Family(
        llama3.ARCHITECTURE,
        llama3.NAMES,
        llama3.read_config,
        llama3.write_config,
        autoregressive=True,
    ),
}


def family_of(fields: Mapping[str, Any], source: str) -> Family:
    """Recognize the family of a config.json.

    The architecture decides: LLaDA's mixtures of experts carry LLaDA's model_type, too.

    Args:
        fields: the parsed file.
        source: its path, for messages.

    Returns:
        The family.

    Raises:
        UserError: for an architecture that is not supported.
    """
    architectures = fields.get("architectures")
    for family in FAMILIES.values():
        if architectures == [family.architecture]:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise UserError(
        f'{source}: "architectures" is {architectures!r}, which is not supported; models of '
        f"{supported} can be converted."
    )
