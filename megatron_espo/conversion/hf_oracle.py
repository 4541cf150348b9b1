"""The same model in transformers, as an independent judge of a conversion.

LLaDA is a Llama, Dream a Qwen2 and SDAR a Qwen3 whose attention sees everything, so that
transformers' own classes with a full attention mask compute their logits without the folder's code;
those of autoregressive models, too. Names and config
fields are read here on their own, not through what the converter uses: a mistake there must show.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_espo.conversion.hugging_face import HuggingFaceWeights
from megatron_espo.conversion.layerwise import stream_weights
from megatron_espo.errors import UserError

_LLADA = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


class HfOracle:
    """A model folder as a transformers model; weights are read when their layer computes."""

    def __init__(
        self, fields: Mapping[str, Any], weights: HuggingFaceWeights, dtype: torch.dtype
    ) -> None:
        """Build the model without memory.

        Args:
            fields: the folder's config.json; of an autoregressive model's also whether its logits
                are those of the next position (``logit_shift``; by default they are).
            weights: its weights.
            dtype: type to compute in.

        Raises:
            UserError: names of weights and model differ.
        """
        llada, (architecture,) = "d_model" in fields, fields["architectures"]
        config = _llada_config(fields) if llada else _llama_config(fields)
        with torch.device("meta"):
            model: PreTrainedModel = _MODELS[type(config)](config)
        model = model.to(dtype).eval()
        # The rotary frequencies are no weights, and float32 in every type.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        rename = _llada_name if llada else str
        home = {rename(name): name for name in weights.tensors}
        tied = architecture in ("LLaDAModelLM", "ILLaDAForCausalLM")
        if fields.get("weight_tying" if llada else "tie_word_embeddings", tied):
            home["lm_head.weight"] = home["model.embed_tokens.weight"]
        if unequal := home.keys() ^ dict(model.named_parameters()).keys():
            raise UserError(f"{weights.folder}: transformers' model differs in {min(unequal)}.")
        stream_weights(
            model,
            ["model.embed_tokens", "model.layers.*", "model.norm", "lm_head"],
            lambda names: {name: weights.read(home[name]).to(dtype) for name in names},
        )
        published = architecture in ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
        shifted = fields.get("logit_shift", True) if published else architecture == "DreamModel"
        self._model, self._shift = model, shifted

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Compute the logits that predict each position.

        Args:
            tokens: int64 ``[b, s]``, padded on the right.
            lengths: int64 ``[b]``.

        Returns:
            float32 ``[b, s, vocabulary]``; a shifted model's position 0 repeats position 1's.
        """
        s = tokens.size(1)
        hidden = torch.arange(s)[None, :] >= lengths[:, None]
        mask = torch.zeros(tokens.size(0), 1, s, s, dtype=self._model.dtype)
        mask.masked_fill_(hidden[:, None, None, :], torch.finfo(mask.dtype).min)
        logits: Tensor = self._model(input_ids=tokens, attention_mask=mask).logits.float()
        return torch.cat((logits[:, :1], logits[:, :-1]), dim=1) if self._shift else logits


def _llada_name(name: str) -> str:
    path, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)", path):
        return f"model.layers.{match[1]}.{_LLADA[match[2]]}.{kind}"
    return f"{_LLADA[path]}.{kind}"


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 4 writes the base beside a scaling, version 5 both into one field.
    plain = {"rope_type": "default", "rope_theta": fields.get("rope_theta", 10000.0)}
    return {**plain, **(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}


def _llada_config(fields: Mapping[str, Any]) -> LlamaConfig | Qwen2Config:
    biased = fields.get("include_qkv_bias", False)
    return (Qwen2Config if biased else LlamaConfig)(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["d_model"],
        intermediate_size=fields.get("mlp_hidden_size")
        or fields.get("mlp_ratio", 4) * fields["d_model"],
        num_hidden_layers=fields["n_layers"],
        num_attention_heads=fields["n_heads"],
        num_key_value_heads=fields.get("n_kv_heads") or fields["n_heads"],
        max_position_embeddings=fields.get("max_sequence_length", 1024),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-5),
        rope_parameters=_rotary(fields),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


_MODELS: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    LlamaConfig: LlamaForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
}
_KINDS = {
    "DreamModel": Qwen2Config,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "SDARForCausalLM": Qwen3Config,
}


def _llama_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim"
    ).split()
    return _KINDS.get(fields["architectures"][0], LlamaConfig)(
        **{name: fields[name] for name in same if name in fields},
        max_position_embeddings=fields.get("max_position_embeddings", 32768),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_parameters=_rotary(fields),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
