"""Which Hugging Face tensors make up which block of which Megatron tensor.

Megatron stacks the layers of a checkpoint along a first axis, packs q, k and v by query group
(weights and biases alike), and puts the gate above the up projection in ``linear_fc1``. Where some
layers are mixtures of experts, it names each layer and stacks the experts of one. The checkpoint
holds global tensors: nothing here depends on a layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        fused: a projection in place of query, key and value, whose rows are those of all queries,
            all keys and all values.
        router: of a mixture of experts, the projection that scores them.
        router_bias: the whole name of the experts' biases, in families that have them.
        expert: prefix of an expert's names, with ``{expert}`` for its number.
        shared: prefix of the shared expert's names.
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
    fused: str = ""
    router: str = ""
    router_bias: str = ""
    expert: str = ""
    shared: str = ""


@dataclass(frozen=True)
class Block:
    """A block of a Megatron tensor, and what it is made of.

    Attributes:
        key: Megatron's name of the tensor in the checkpoint.
        global_shape: shape of the whole tensor, layers or experts stacked in front.
        offset: where the block starts in it.
        stacked: whether the first axis of the tensor counts layers or experts.
        sources: Hugging Face names and shapes.
        groups: query groups to pack several sources by.
        fused: of a single source that is several in one, the rows of each; none elsewhere.
        dtype: the type of the block whatever that of the others is; None: as theirs.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    stacked: bool
    sources: Mapping[str, tuple[int, ...]]
    groups: int = 1
    fused: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the block, with an axis of one in front if layers or experts are stacked."""
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
        if self.fused:
            tensors = tensors[0].split(self.fused)
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
        rows = self.fused or [shape[0] for shape in self.sources.values()]
        block = block.reshape(self.groups, -1, *self.shape[self.stacked + 1 :])
        parts = block.split([count // self.groups for count in rows], dim=1)
        if self.fused:
            ((name, shape),) = self.sources.items()
            return {name: torch.cat([part.flatten(0, 1) for part in parts]).reshape(shape)}
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


class _Layer:
    """Makes the blocks of one layer."""

    def __init__(self, shape: ModelShape, names: Names, layer: int) -> None:
        self.shape, self.names, self.layer = shape, names, layer
        self.prefix = names.layer.format(layer=layer)

    def block(
        self,
        key: str,
        sources: Mapping[str, tuple[int, ...]],
        rows: int,
        start: int = 0,
        *,
        expert: int | None = None,
        **settings: Any,
    ) -> Block:
        """Make a block of some sources, whose names are those after the layer's prefix."""
        inner = next(iter(sources.values()))[1:]
        size, offset = (rows, *inner), (start, *(0 for _ in inner))
        named = {self.prefix + name: source for name, source in sources.items()}
        experts = self.shape.experts
        if experts is None:
            size, offset = (self.shape.num_layers, *size), (self.layer, *offset)
            return Block(f"decoder.layers.{key}", size, offset, True, named, **settings)
        if expert is not None:
            size, offset = (experts.num_experts, *size), (expert, *offset)
        path = f"decoder.layers.{self.layer}.{key}"
        return Block(path, size, offset, expert is not None, named, **settings)

    def feed_forward(
        self, key: str, prefix: str, inner: int, expert: int | None = None
    ) -> list[Block]:
        """Make the blocks of a gated feed-forward part."""
        names, hidden = self.names, self.shape.hidden_size
        gate, up, down = (
            f"{prefix}{name.rsplit('.', 1)[-1] if prefix else name}.weight"
            for name in (names.gate, names.up, names.down)
        )
        fc1, fc2 = f"{key}.linear_fc1.weight", f"{key}.linear_fc2.weight"
        return [
            self.block(fc1, {gate: (inner, hidden)}, 2 * inner, expert=expert),
            self.block(fc1, {up: (inner, hidden)}, 2 * inner, inner, expert=expert),
            self.block(fc2, {down: (hidden, inner)}, hidden, expert=expert),
        ]

    def mixture(self) -> list[Block]:
        """Make the blocks of a mixture of experts."""
        experts, names, hidden = self.shape.experts, self.names, self.shape.hidden_size
        assert experts is not None
        weight, bias = (experts.num_experts, hidden), (experts.num_experts,)
        blocks = [self.block("mlp.router.weight", {f"{names.router}.weight": weight}, weight[0])]
        if experts.bias:
            own = {names.router_bias: bias}
            # Megatron adds to it in float32, in models of every type.
            blocks.append(self.block(f"mlp.router.{_BIAS}", own, weight[0], dtype=torch.float32))
        for expert in range(experts.num_experts):
            prefix = names.expert.format(expert=expert)
            blocks += self.feed_forward("mlp.experts.experts", prefix, experts.hidden_size, expert)
        if experts.shared_size is not None:
            blocks += self.feed_forward("mlp.shared_experts", names.shared, experts.shared_size)
        return blocks


_BIAS = "expert_bias"


def has_own_type(key: str) -> bool:
    """Say whether a tensor of a checkpoint may have another type than the others."""
    return key.endswith(f".{_BIAS}")


def _is_mixture(shape: ModelShape, layer: int) -> bool:
    return shape.experts is not None and bool(shape.experts.layers[layer])


def _layer_blocks(shape: ModelShape, names: Names, layer: int) -> list[Block]:
    hidden, groups = shape.hidden_size, shape.num_query_groups
    make, is_mixture = _Layer(shape, names, layer), _is_mixture(shape, layer)
    queries = shape.num_attention_heads * shape.head_dim
    heads = {
        names.query: queries,
        names.key: groups * shape.head_dim,
        names.value: groups * shape.head_dim,
    }
    rows = tuple(heads.values())
    weights: dict[str, tuple[int, ...]] = {f"{n}.weight": (r, hidden) for n, r in heads.items()}
    biases: dict[str, tuple[int, ...]] = {f"{n}.bias": (r,) for n, r in heads.items()}
    if names.fused:
        weights = {f"{names.fused}.weight": (sum(rows), hidden)}
    # Transformer Engine's spec has a norm of its own before a mixture.
    norm = "pre_mlp_layernorm.weight" if is_mixture else "mlp.linear_fc1.layer_norm_weight"
    blocks = [
        make.block(
            "self_attention.linear_qkv.layer_norm_weight",
            {f"{names.attention_norm}.weight": (hidden,)},
            hidden,
        ),
        make.block(
            "self_attention.linear_qkv.weight",
            weights,
            sum(rows),
            groups=groups,
            fused=rows if names.fused else (),
        ),
        make.block(
            "self_attention.linear_proj.weight",
            {f"{names.attention_output}.weight": (hidden, queries)},
            hidden,
        ),
        make.block(norm, {f"{names.ffn_norm}.weight": (hidden,)}, hidden),
    ]
    blocks += make.mixture() if is_mixture else make.feed_forward("mlp", "", shape.ffn_hidden_size)
    if shape.qkv_bias:
        blocks.insert(
            2, make.block("self_attention.linear_qkv.bias", biases, sum(rows), groups=groups)
        )
    if shape.qk_norm:
        for part, name in zip(_QK_NORMS, (names.query_norm, names.key_norm), strict=True):
            source: dict[str, tuple[int, ...]] = {f"{name}.weight": (shape.head_dim,)}
            blocks.append(make.block(f"{part}.weight", source, shape.head_dim))
    return blocks


_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")

# Modules that carry an extra state in a checkpoint: Transformer Engine's FP8 scales. Megatron's
# plain layers keep an empty one, so that a checkpoint without it fits neither.
_ATTENTION_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
)
_FEED_FORWARD_STATES = ("linear_fc1", "linear_fc2")


def extra_states(shape: ModelShape) -> dict[str, int]:
    """List the extra states of the modules.

    Args:
        shape: the model.

    Returns:
        Key in the checkpoint -> number of parts.
    """
    attention = (*_ATTENTION_STATES, *(_QK_NORMS if shape.qk_norm else ()))
    states = {"decoder.final_layernorm": 1}
    if shape.experts is None:
        for name in (*attention, *(f"mlp.{part}" for part in _FEED_FORWARD_STATES)):
            states[f"decoder.layers.{name}"] = shape.num_layers
    else:
        for layer in range(shape.num_layers):
            path = f"decoder.layers.{layer}"
            states.update(dict.fromkeys((f"{path}.{name}" for name in attention), 1))
            parts = {"mlp": 1}
            if _is_mixture(shape, layer):
                parts = {"mlp.experts.experts": shape.experts.num_experts}
                parts |= {"mlp.shared_experts": 1} if shape.experts.shared_size else {}
            for part, count in parts.items():
                states.update({f"{path}.{part}.{name}": count for name in _FEED_FORWARD_STATES})
    return {f"{name}._extra_state": count for name, count in states.items()}
