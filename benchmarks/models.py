"""One set of weights in two models: this project's (Megatron) and transformers' Llama."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training import training as megatron_training
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_espo.commands.inference import load_model
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.provider import model_provider
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import diffusion_model, initialize_process_groups


@dataclass(frozen=True)
class Shape:
    """A Llama-like model of float32 weights.

    Attributes:
        vocab_size: tokens.
        hidden_size: width.
        num_layers: depth; heads are 64 channels wide, the feed-forward part three times the width.
        mask_token_id: the mask token.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    mask_token_id: int

    @property
    def num_heads(self) -> int:
        """Attention heads; every one has its own keys and values."""
        return max(self.hidden_size // 64, 1)

    def flags(self) -> list[str]:
        """Write the shape as command-line flags (the preset gives norms, RoPE and SwiGLU)."""
        return (
            f"--preset tiny --num-layers {self.num_layers} --hidden-size {self.hidden_size} "
            f"--ffn-hidden-size {3 * self.hidden_size} --num-attention-heads {self.num_heads} "
            f"--vocab-size {self.vocab_size} --mask-token-id {self.mask_token_id} "
            "--make-vocab-size-divisible-by 128"
        ).split()


SHAPES = {
    "large-vocabulary": Shape(126464, 256, 4, 126336),
    "small-vocabulary": Shape(4096, 512, 8, 4095),
    "tiny": Shape(384, 128, 4, 256),
    "smoke": Shape(384, 64, 2, 256),
}
"""The shapes that are measured: LLaDA's vocabulary on a small body, a small head, the demo's size,
and a shape on which tests see that everything runs."""


def build_random(shape: Shape, seed: int = 1) -> DiffusionModel:
    """Build the model that training would build, with random weights, ready for gradients.

    Args:
        shape: the model.
        seed: of the weights.

    Returns:
        One rank's model in Megatron's data-parallel wrapper, which holds the gradients.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        save_tokenizer(byte_tokenizer(), tokenizer)
        argv = (
            f"--tokenizer-model {tokenizer} --seq-length 4096 --micro-batch-size 1 --train-iters 1 "
            f"--seed {seed} --init-method-std 0.05"
        ).split()
        args = initialize_arguments([*shape.flags(), *argv], _no_checks)
        store = initialize_process_groups(args)
        megatron_training.initialize_megatron(store=store)
        chunks = megatron_training.get_model(model_provider, ModelType.encoder_or_decoder)
        return diffusion_model(chunks)


def _no_checks(args: Any) -> None:
    args.rerun_mode = "disabled"


def build_trained(folder: str) -> DiffusionModel:
    """Load a checkpoint for sampling.

    Args:
        folder: a --save folder; the tokenizer lies beside it.

    Returns:
        The model in evaluation mode.
    """
    argv = ["--load", folder, "--tokenizer-model", str(Path(folder).parent / "tokenizer")]
    return load_model(argv)[0]


def llama_oracle(model: DiffusionModel, shape: Shape) -> LlamaForCausalLM:
    """Copy the weights of a Megatron model into transformers' Llama.

    Args:
        model: one rank's whole model.
        shape: its shape.

    Returns:
        The Llama, float32, with scaled-dot-product attention.
    """
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config)
    weights = llama_weights(model, shape)
    llama.load_state_dict(weights, assign=True)
    return llama.eval()


def llama_weights(
    model: DiffusionModel, shape: Shape, tensors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Rename and unpack the parameters of a Megatron model, or other tensors of their shapes.

    Args:
        model: one rank's whole model.
        shape: its shape.
        tensors: by Megatron's parameter names; the parameters if None.

    Returns:
        Copies under the names of LlamaForCausalLM.
    """
    (chunk,) = unwrap_model(list(model.chunks))
    ours = tensors or {name: value.detach() for name, value in chunk.named_parameters()}
    n, head = shape.vocab_size, shape.hidden_size // shape.num_heads
    weights = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][:n],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"][:n],
    }
    for layer in range(shape.num_layers):
        our, their = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        packed = ours[our + "self_attention.linear_qkv.weight"]
        query, key, value = packed.view(shape.num_heads, 3, head, -1).unbind(1)
        gate, up = ours[our + "mlp.linear_fc1.weight"].chunk(2)
        weights |= {
            their + "input_layernorm.weight": ours[our + "input_layernorm.weight"],
            their + "post_attention_layernorm.weight": ours[our + "pre_mlp_layernorm.weight"],
            their + "self_attn.q_proj.weight": query.flatten(0, 1),
            their + "self_attn.k_proj.weight": key.flatten(0, 1),
            their + "self_attn.v_proj.weight": value.flatten(0, 1),
            their + "self_attn.o_proj.weight": ours[our + "self_attention.linear_proj.weight"],
            their + "mlp.gate_proj.weight": gate,
            their + "mlp.up_proj.weight": up,
            their + "mlp.down_proj.weight": ours[our + "mlp.linear_fc2.weight"],
        }
    return {name: value.clone() for name, value in weights.items()}


def random_prompts(count: int, length: int, shape: Shape, seed: int = 0) -> Sequence[Sequence[int]]:
    """Draw prompts of random tokens, none of them the mask token.

    Args:
        count: prompts.
        length: tokens of each.
        shape: decides the vocabulary.
        seed: of the draw.

    Returns:
        Token ids.
    """
    generator = torch.Generator().manual_seed(seed)
    below = min(shape.vocab_size, shape.mask_token_id)
    prompts: list[list[int]] = torch.randint(below, (count, length), generator=generator).tolist()
    return prompts
