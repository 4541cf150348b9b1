"""Which Hugging Face tensors make up which block of which Megatron tensor.

Megatron stacks the layers of a checkpoint along a first axis, packs q, k and v by query group
(weights and biases alike), and puts the gate above the up projection in ``linear_fc1``. The
checkpoint holds global tensors: nothing here depends on a layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.model.shape import ModelShape


@dataclass(frozen=True)
class Names:
    """A family's tensor names, without ``.weight`` and ``.bias``.

    Attributes:
        embedding: token embedding.
        final_norm: norm after the last layer.
        head: output projection.
        layer: prefix of a layer's names, with ``{layer}`` for its number. The others follow it.
        attention_norm: norm before the attention.
        query: q projection.
        key: k projection.
        value: v projection.
        attention_output: output projection of the attention.
        ffn_norm: norm before the feed-forward part.
        gate: the projection that goes through the activation.
        up: the other one.
        down: the projection back.
        query_norm: norm of each head's queries, in families that have it.
        key_norm: of its keys.
    """

    embedding: str
    final_norm: str
    head: str
    layer: str
    attention_norm: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_norm: str
    gate: str
    up: str
    down: str
    query_norm: str = ""
    key_norm: str = ""


@dataclass(frozen=True)
class Block:
    """A block of a Megatron tensor, and what it is made of.

    Attributes:
        key: Megatron's name of the tensor in the checkpoint.
        global_shape: shape of the whole tensor, layers stacked in front.
        offset: where the block starts in it.
        stacked: whether the first axis of the tensor counts layers.
        sources: Hugging Face names and shapes.
        groups: query groups to pack several sources by.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    stacked: bool
    sources: Mapping[str, tuple[int, ...]]
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the block, with an axis of one layer in front if the layers are stacked."""
        shapes = list(self.sources.values())
        rows = sum(shape[0] for shape in shapes)
        return (1,) * self.stacked + (rows, *shapes[0][1:])

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Make the block.

        Args:
            tensors: the sources in order.

        Returns:
            The block, of :attr:`shape`; with a single source, without a copy.
        """
        if len(tensors) == 1:
            return tensors[0].reshape(self.shape)
        by_group = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(by_group, dim=1).reshape(self.shape)

    def unpack(self, block: Tensor) -> dict[str, Tensor]:
        """Take the block apart; the inverse of :meth:`pack`.

        Args:
            block: of :attr:`shape`.

        Returns:
            The sources by name; contiguous.
        """
        shapes = self.sources.values()
        block = block.reshape(self.groups, -1, *self.shape[self.stacked + 1 :])
        parts = block.split([shape[0] // self.groups for shape in shapes], dim=1)
        return {
            name: part.reshape(shape).contiguous()
            for part, (name, shape) in zip(parts, self.sources.items(), strict=True)
        }


def model_blocks(shape: ModelShape, names: Names) -> list[Block]:
    """List the blocks of a model's checkpoint; each tensor of either side occurs once.

    Args:
        shape: the model.
        names: the Hugging Face names.

    Returns:
        The blocks, embedding first, head last; tied embeddings have no head of their own.
    """
    hidden, vocab = shape.hidden_size, shape.vocab_size
    top = [
        ("embedding.word_embeddings.weight", names.embedding, (vocab, hidden)),
        ("decoder.final_layernorm.weight", names.final_norm, (hidden,)),
    ]
    if not shape.tied_embeddings:
        top.append(("output_layer.weight", names.head, (vocab, hidden)))
    embedding, *last = (
        Block(key, size, (0,) * len(size), False, {f"{name}.weight": size})
        for key, name, size in top
    )
    layers = [
        block for layer in range(shape.num_layers) for block in _layer_blocks(shape, names, layer)
    ]
    return [embedding, *layers, *last]


def tied_copies(shape: ModelShape, names: Names) -> dict[str, str]:
    """List the tensors that a folder may hold although they are copies of others.

    Args:
        shape: the model.
        names: the Hugging Face names.

    Returns:
        Name of the copy -> name of what it is a copy of: with tied embeddings the output head's.
    """
    return {f"{names.head}.weight": f"{names.embedding}.weight"} if shape.tied_embeddings else {}


def _layer_blocks(shape: ModelShape, names: Names, layer: int) -> list[Block]:
    hidden, ffn, groups = shape.hidden_size, shape.ffn_hidden_size, shape.num_query_groups
    prefix = names.layer.format(layer=layer)

    def block(
        key: str, sources: dict[str, tuple[int, ...]], rows: int, start: int = 0, groups: int = 1
    ) -> Block:
        inner = next(iter(sources.values()))[1:]
        size = (shape.num_layers, rows, *inner)
        offset = (layer, start, *(0 for _ in inner))
        named = {prefix + name: source for name, source in sources.items()}
        return Block(f"decoder.layers.{key}", size, offset, True, named, groups)

    queries = shape.num_attention_heads * shape.head_dim
    heads = {
        names.query: queries,
        names.key: groups * shape.head_dim,
        names.value: groups * shape.head_dim,
    }
    qkv_rows = sum(heads.values())
    weights = {f"{name}.weight": (rows, hidden) for name, rows in heads.items()}
    biases: dict[str, tuple[int, ...]] = {f"{name}.bias": (r,) for name, r in heads.items()}
    blocks = [
        block(
            "self_attention.linear_qkv.layer_norm_weight",
            {f"{names.attention_norm}.weight": (hidden,)},
            hidden,
        ),
        block("self_attention.linear_qkv.weight", {**weights}, qkv_rows, groups=groups),
        block(
            "self_attention.linear_proj.weight",
            {f"{names.attention_output}.weight": (hidden, queries)},
            hidden,
        ),
        block("mlp.linear_fc1.layer_norm_weight", {f"{names.ffn_norm}.weight": (hidden,)}, hidden),
        block("mlp.linear_fc1.weight", {f"{names.gate}.weight": (ffn, hidden)}, 2 * ffn),
        block("mlp.linear_fc1.weight", {f"{names.up}.weight": (ffn, hidden)}, 2 * ffn, start=ffn),
        block("mlp.linear_fc2.weight", {f"{names.down}.weight": (hidden, ffn)}, hidden),
    ]
    if shape.qkv_bias:
        blocks.insert(2, block("self_attention.linear_qkv.bias", biases, qkv_rows, groups=groups))
    if shape.qk_norm:
        for norm, name in zip(_QK_NORMS, (names.query_norm, names.key_norm), strict=True):
            source: dict[str, tuple[int, ...]] = {f"{name}.weight": (shape.head_dim,)}
            blocks.append(block(f"{norm}.weight", source, shape.head_dim))
    return blocks


_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")

# Modules that carry an extra state in a checkpoint: Transformer Engine's FP8 scales. Megatron's
# plain layers keep an empty one, so that a checkpoint without it fits neither.
_LAYER_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def extra_states(shape: ModelShape) -> dict[str, int]:
    """List the extra states of the modules.

    Args:
        shape: the model.

    Returns:
        Key in the checkpoint -> number of parts.
    """
    modules = (*_LAYER_STATES, *(_QK_NORMS if shape.qk_norm else ()))
    states = {f"decoder.layers.{name}._extra_state": shape.num_layers for name in modules}
    return {**states, "decoder.final_layernorm._extra_state": 1}
