"""What a published config.json says of a model, in one form for every family."""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_espo.errors import UserError


def query_groups(args: argparse.Namespace) -> int:
    """Read the key/value heads from Megatron's arguments; without grouped queries all heads."""
    grouped = getattr(args, "group_query_attention", False)
    groups: int = args.num_query_groups if grouped else args.num_attention_heads
    return groups


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

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def of(cls, args: argparse.Namespace, eos_token_id: int) -> "ModelShape":
        """Read the shape from the arguments of a checkpoint.

        Args:
            args: Megatron's arguments, as stored in a checkpoint.
            eos_token_id: end of sequence, which they do not name.

        Returns:
            The shape; :meth:`differences` tells whether it says all that the arguments do.
        """
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
        return flags

    def differences(self, args: argparse.Namespace) -> list[str]:
        """Compare with the arguments of a checkpoint.

        Args:
            args: Megatron's arguments, as stored in a checkpoint.

        Returns:
            One phrase per difference; empty if the weights fit this shape.
        """
        theirs = dataclasses.asdict(ModelShape.of(args, self.eos_token_id))
        theirs["head_dim"] = args.kv_channels
        # A limit on the length of sequences, which changes no result.
        del theirs["max_position_embeddings"]
        found = [
            f"{name} is {value} there and {getattr(self, name)} here"
            for name, value in theirs.items()
            if value != getattr(self, name)
        ]
        for name, wanted in _FIXED.items():
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
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
}


class Config:
    """A config.json that is read field by field; what was not understood can be told."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        source: str,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap the fields.

        Args:
            fields: the parsed file.
            source: its path, for messages.
            defaults: what the model's own code takes for fields that the file does not have.
        """
        self.fields, self.source = {**(defaults or {}), **fields}, source
        self._absent = self.fields.keys() - fields.keys()

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Config":
        """Return the same file, read with these defaults."""
        return Config(self.fields, self.source, defaults)

    def _says(self, name: str) -> str:
        """Say what the file holds in a field, or what stands for it."""
        said = f'"{name}" is {self.fields.get(name)!r}'
        return (
            f"{said} (the model's own default; the file has none)" if name in self._absent else said
        )

    def number[Number: (int, float)](self, name: str, kind: type[Number]) -> Number:
        """Read a positive number.

        Raises:
            UserError: naming the field.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{self.source}: {self._says(name)}; a positive number is needed.")
        if kind is int and value != int(value):
            raise UserError(f"{self.source}: {self._says(name)}; a whole number is needed.")
        return kind(value)

    def token(self, name: str, vocab_size: int) -> int:
        """Read a token id.

        Raises:
            UserError: naming the field.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise UserError(
                f"{self.source}: {self._says(name)}; a token id below {vocab_size} is needed."
            )
        return value

    def switch(self, name: str) -> bool:
        """Read a field that is true or false; one that is absent is false.

        Raises:
            UserError: naming the field.
        """
        self.require(name, False, True)
        return bool(self.fields.get(name, False))

    def rotary_base(self) -> float:
        """Read the base of the rotary embedding, where transformers 4 and where version 5 write it.

        Raises:
            UserError: the frequencies are scaled, or the two places differ.
        """
        bases = set()
        for name in ("rope_parameters", "rope_scaling"):
            rope = self.fields.get(name)
            if rope is None:
                continue
            plain = isinstance(rope, Mapping) and all(
                key == "rope_theta" or (key, value) in _PLAIN_ROPE for key, value in rope.items()
            )
            if not plain:
                raise UserError(
                    f'{self.source}: "{name}" is {rope!r}, which is not supported; rotary '
                    'embeddings must be of the type "default", without scaling.'
                )
            if "rope_theta" in rope:
                bases.add(Config(rope, f'{self.source}: "{name}"').number("rope_theta", float))
        # transformers 5 leaves the field itself out.
        stated = "rope_theta" in self.fields and "rope_theta" not in self._absent
        if stated or not bases:
            bases.add(self.number("rope_theta", float))
        if len(bases) > 1:
            raise UserError(
                f'{self.source}: "rope_theta" is {" and ".join(map(str, sorted(bases)))} in two '
                "places; correct one."
            )
        return bases.pop()

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse a value that changes what the model computes.

        Args:
            name: the field; one that is absent takes the first allowed value.
            allowed: the values that are supported.

        Raises:
            UserError: naming the field.
        """
        value = self.fields.get(name, allowed[0])
        if not any(value == one and type(value) is type(one) for one in allowed):
            wanted = " or ".join(repr(one) for one in allowed)
            raise UserError(
                f"{self.source}: {self._says(name)}, which is not supported; it must be {wanted}."
            )


# What says no more than that nothing is scaled, in what either version of transformers writes.
_PLAIN_ROPE = (
    ("rope_type", "default"),
    ("type", "default"),
    ("factor", 1.0),
    ("partial_rotary_factor", 1.0),
)


def check_heads(shape: ModelShape, source: str, heads: str, groups: str, hidden: str) -> ModelShape:
    """Check that heads divide the hidden size, and groups the heads.

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
    if shape.hidden_size % shape.num_attention_heads:
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
