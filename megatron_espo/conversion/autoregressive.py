"""What the folder of an autoregressive model does not say that masked diffusion asks.

Its mask token is a row of the vocabulary that no text uses (data/mask_token.py). Its hidden state
at a position predicts the next one: a model that starts from it keeps that (``logit_shift``), or is
trained to predict in place, as SDAR was. Folders written here say both in fields of their own,
which transformers passes over.
"""

import dataclasses
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.model.published_config import Config
from megatron_espo.model.shape import ModelShape

DEFAULTS: dict[str, Any] = {"logit_shift": True}
"""What is taken for the fields that published folders do not have."""


def own_fields(shape: ModelShape) -> dict[str, Any]:
    """Write what differs from :data:`DEFAULTS`, and how the model attends if it was adapted."""
    own: dict[str, Any] = {} if shape.logit_shift else {"logit_shift": False}
    if shape.attention_mask is not None:
        own |= {"attention_mask": shape.attention_mask, "block_size": shape.block_size}
    return own


def with_own_fields(shape: ModelShape, config: Config) -> ModelShape:
    """Read how a model attends that was adapted to blocks.

    Args:
        shape: the rest of its shape.
        config: its config.json.

    Returns:
        The whole shape.

    Raises:
        UserError: naming the field.
    """
    config.require("attention_mask", None, "block-causal", "context-causal")
    mask = config.fields.get("attention_mask")
    size = None if mask is None else config.number("block_size", int)
    return dataclasses.replace(shape, attention_mask=mask, block_size=size)


def require_full_attention(config: Config) -> None:
    """Refuse layers whose attention does not reach everywhere.

    Args:
        config: a config.json in Qwen's form.

    Raises:
        UserError: naming the field.
    """
    config.require("use_sliding_window", False)
    kinds = config.fields.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {"full_attention"}):
        raise UserError(
            f'{config.source}: "layer_types" is {kinds!r}, which is not supported; all must be '
            '"full_attention".'
        )
