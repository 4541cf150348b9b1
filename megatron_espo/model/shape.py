"""The shape of a published model, in one form for every family."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_espo.errors import UserError
from megatron_espo.model.published_config import LLAMA3_SCALING


def query_groups(args: argparse.Namespace) -> int:
    """Read the key/value heads from Megatron's arguments; without grouped queries all heads."""
    grouped = getattr(args, "group_query_attention", False)
    groups: int = args.num_query_groups if grouped else args.num_attention_heads
    return groups


@dataclass(frozen=True)
class ExpertShape:
    """The mixtures of experts in a model; see model/experts.py."""

    num_experts: int
    topk: int
    """Experts that compute a token."""
    hidden_size: int
    """Channels inside an expert."""
    layers: tuple[int, ...]
    """For each layer 1 if it is a mixture, 0 if it has a feed-forward part for all tokens."""
    shared_size: int | None = None
    """Channels inside the shared expert, which computes every token; None without one."""
    score: str = "softmax"
    """What makes scores of logits: softmax over all experts, or sigmoid."""
    bias: bool = False
    """Whether each expert has a bias for its choice."""
    groups: int | None = None
    best_groups: int | None = None
    """Of so many groups of experts so many are looked at; None without groups."""
    scaling: float | None = None
    """Factor of the weights; None for 1."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ExpertShape | None":
        """Read it from the arguments of a checkpoint; None for a model without."""
        if getattr(args, "num_experts", None) is None:
            return None
        frequency = args.moe_layer_freq
        if isinstance(frequency, int):
            frequency = [int(layer % frequency == 0) for layer in range(args.num_layers)]
        return cls(
            num_experts=args.num_experts,
            topk=args.moe_router_topk,
            hidden_size=args.moe_ffn_hidden_size,
            layers=tuple(frequency),
            shared_size=args.moe_shared_expert_intermediate_size,
            score=args.moe_router_score_function,
            bias=args.moe_router_enable_expert_bias,
            groups=args.moe_router_num_groups,
            best_groups=args.moe_router_group_topk,
            scaling=args.moe_router_topk_scaling_factor,
        )

    def flags(self) -> list[str]:
        """Write it as Megatron's flags."""
        flags = (
            f"--num-experts {self.num_experts} --moe-router-topk {self.topk} "
            f"--moe-ffn-hidden-size {self.hidden_size} "
            f"--moe-layer-freq [{','.join(map(str, self.layers))}] "
            f"--moe-router-score-function {self.score}"
        ).split()
        if self.score == "softmax":
            flags.append("--moe-router-pre-softmax")
        if self.bias:
            flags.append("--moe-router-enable-expert-bias")
        for flag, value in (
            ("--moe-shared-expert-intermediate-size", self.shared_size),
            ("--moe-router-num-groups", self.groups),
            ("--moe-router-group-topk", self.best_groups),
            ("--moe-router-topk-scaling-factor", self.scaling),
        ):
            if value is not None:
                flags += [flag, str(value)]
        return flags


@dataclass(frozen=True)
class ModelShape:
    """The facts that decide which tensors a model has and what they compute."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; equal to the attention heads without grouped queries."""
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    norm_epsilon: float
    qkv_bias: bool
    """Biases on q, k and v, and nowhere else."""
    logit_shift: bool
    """Position i is predicted from the hidden state at i - 1."""
    mask_token_id: int
    eos_token_id: int
    tied_embeddings: bool = False
    """The output head has the embedding's weights."""
    kv_channels: int | None = None
    """Channels of one head where they are not hidden size / heads."""
    qk_norm: bool = False
    """RMS norms of each head's queries and keys before they are rotated."""
    rope_scaling_factor: float | None = None
    """Llama 3's scaling of the rotary frequencies, by this factor; None without it."""
    attention_mask: str | None = None
    """How tokens attend that come block by block (--attention-mask); None for full attention."""
    block_size: int | None = None
    """Tokens of a block; None for full attention."""
    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated."""
    experts: ExpertShape | None = None
    """Mixtures of experts; None for a model without."""

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @classmethod
    def of(cls, args: argparse.Namespace, eos_token_id: int) -> "ModelShape":
        """Read the shape from the arguments of a checkpoint.

        Args:
            args: Megatron's arguments, as stored in a checkpoint.
            eos_token_id: end of sequence, which they do not name.

        Returns:
            The shape; :meth:`differences` tells whether it says all that the arguments do.
        """
        usual = args.kv_channels * args.num_attention_heads == args.hidden_size
        mask = getattr(args, "attention_mask", None)  # checkpoints may be older
        mask = None if mask == "full" else mask
        return cls(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=query_groups(args),
            vocab_size=args.vocab_size,
            max_position_embeddings=args.max_position_embeddings,
            rotary_base=args.rotary_base,
            norm_epsilon=args.layernorm_epsilon,
            qkv_bias=args.add_qkv_bias,
            logit_shift=args.logit_shift,
            mask_token_id=args.mask_token_id,
            eos_token_id=eos_token_id,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            kv_channels=None if usual else args.kv_channels,
            qk_norm=args.qk_layernorm,
            rope_scaling_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
            attention_mask=mask,
            block_size=args.block_size if mask else None,
            rotary_percent=args.rotary_percent,
            experts=ExpertShape.of(args),
        )

    def flags(self) -> list[str]:
        """Write the shape as Megatron's flags and the project's."""
        flags = (
            f"--num-layers {self.num_layers} --hidden-size {self.hidden_size} "
            f"--ffn-hidden-size {self.ffn_hidden_size} "
            f"--num-attention-heads {self.num_attention_heads} "
            f"--vocab-size {self.vocab_size} --mask-token-id {self.mask_token_id} "
            f"--max-position-embeddings {self.max_position_embeddings} "
            f"--rotary-base {self.rotary_base:.0f} --norm-epsilon {self.norm_epsilon} "
            "--position-embedding-type rope --normalization RMSNorm --swiglu "
            "--disable-bias-linear --attention-dropout 0.0 --hidden-dropout 0.0"
        ).split()
        if self.num_query_groups != self.num_attention_heads:
            flags += ["--group-query-attention", "--num-query-groups", str(self.num_query_groups)]
        if not self.tied_embeddings:
            flags.append("--untie-embeddings-and-output-weights")
        if self.qkv_bias:
            flags.append("--add-qkv-bias")
        if self.logit_shift:
            flags.append("--logit-shift")
        if self.kv_channels is not None:
            flags += ["--kv-channels", str(self.kv_channels)]
        if self.qk_norm:
            flags.append("--qk-layernorm")
        if self.rope_scaling_factor is not None:
            flags += ["--use-rope-scaling", "--rope-scaling-factor", str(self.rope_scaling_factor)]
        if self.attention_mask is not None:
            flags += ["--attention-mask", self.attention_mask, "--block-size", str(self.block_size)]
        if self.rotary_percent != 1.0:
            flags += ["--rotary-percent", str(self.rotary_percent)]
        return flags if self.experts is None else flags + self.experts.flags()

    def _facts(self) -> dict[str, Any]:
        """List what decides a result, by name; that of experts one by one."""
        facts = {**vars(self), "head_dim": self.head_dim}
        # The length of sequences is limited, and changes no result.
        for name in ("kv_channels", "max_position_embeddings", "experts"):
            del facts[name]
        experts = {} if self.experts is None else vars(self.experts)
        return facts | {f"experts.{name}": value for name, value in experts.items()}

    def differences(self, args: argparse.Namespace) -> list[str]:
        """Compare with the arguments of a checkpoint.

        Args:
            args: Megatron's arguments, as stored in a checkpoint.

        Returns:
            One phrase per difference; empty if the weights fit this shape.
        """
        theirs, ours = ModelShape.of(args, self.eos_token_id)._facts(), self._facts()
        theirs["head_dim"] = args.kv_channels
        found = [
            f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
            for name in dict.fromkeys([*theirs, *ours])
            if theirs.get(name) != ours.get(name)
        ]
        softmax = self.experts is not None and self.experts.score == "softmax"
        fixed = {**_FIXED, "moe_router_pre_softmax": softmax}
        for name, wanted in fixed.items():
            if (value := getattr(args, name)) != wanted:
                found.append(f"{name} is {value} there and must be {wanted}")
        return found


# What every family has, of the settings in model/supported.py.
_FIXED = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
}


def write_rotary(shape: ModelShape) -> dict[str, Any]:
    """Write what Config.rotary reads.

    Args:
        shape: the shape.

    Returns:
        The fields, as transformers 4 and 5 read them.
    """
    scaling = None
    if shape.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": shape.rope_scaling_factor, **LLAMA3_SCALING}
    return {"rope_scaling": scaling, "rope_theta": float(shape.rotary_base)}


def check_heads(shape: ModelShape, source: str, heads: str, groups: str, hidden: str) -> ModelShape:
    """Check that heads divide the hidden size or have their own, and groups the heads.

    Args:
        shape: the shape.
        source: the file, for messages.
        heads: the family's name of the number of heads.
        groups: of the key/value heads.
        hidden: of the hidden size.

    Returns:
        The shape.

    Raises:
        UserError: naming the field.
    """
    if shape.kv_channels is None and shape.hidden_size % shape.num_attention_heads:
        raise UserError(
            f'{source}: "{hidden}" {shape.hidden_size} is not divisible by "{heads}" '
            f"{shape.num_attention_heads}."
        )
    if shape.num_attention_heads % shape.num_query_groups:
        raise UserError(
            f'{source}: "{heads}" {shape.num_attention_heads} is not divisible by "{groups}" '
            f"{shape.num_query_groups}."
        )
    if shape.rotary_base != int(shape.rotary_base):
        raise UserError(f'{source}: "rope_theta" {shape.rotary_base} must be a whole number.')
    return dataclasses.replace(shape, rotary_base=int(shape.rotary_base))
