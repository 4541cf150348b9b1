"""Memory that passes through the layers take beside weights and optimizer: arithmetic on shapes.

What a layer keeps for its backward pass follows arXiv 2205.05198, section 4, for a gated
feed-forward part, without dropout, with an attention kernel that does not store its scores, as
Transformer Engine 2.20 and the local layers (model/) save it.

Symbols: r rows that reach the output head, T positions of all rows of a micro-batch on this rank, h
hidden size, f inner width, n vocabulary.
"""

import argparse
from dataclasses import dataclass

from megatron_espo.model.shape import ExpertShape, query_groups
from megatron_espo.parallel.cross_entropy import BLOCK

# Rows of the head's weight whose float32 gradient is held at a time: model/weight_gradients.py.
_BLOCK = 4096
# Workspace of Transformer Engine's matrix products on GPUs with FP8.
_WORKSPACE = 32 * 2**20 + 1024


@dataclass(frozen=True)
class Sizes:
    """Sizes of one rank's layers in numbers per position of a row.

    Attributes:
        width: bytes of a number.
        hidden: h.
        part: h on this rank where positions are split over the tensor-parallel ranks.
        query: queries of all heads of this rank; the attention's output, too.
        key_value: keys and values.
        inner: f of this rank.
        vocabulary: n of this rank.
        grouped: whether several heads share keys and values.
        normed: whether queries and keys are normalized.
        with_te: whether the layers are Transformer Engine's.
        cp: context-parallel size.
        fp8: whether what linear layers keep of their inputs is in FP8.
        again: modules whose activations are computed again in the backward pass.
        mixture: of a model with experts what passes them; all layers are taken for mixtures, and
            every rank to get as many tokens.
    """

    width: int
    hidden: int
    part: float
    query: float
    key_value: float
    inner: float
    vocabulary: float
    grouped: bool
    normed: bool
    with_te: bool
    cp: int
    fp8: bool
    again: tuple[str, ...]
    mixture: "Mixture | None" = None


@dataclass(frozen=True)
class Mixture:
    """Sizes of a mixture of experts.

    Attributes:
        topk: experts of a token.
        inner: channels inside one of them on this rank.
        shared: channels inside the shared expert on this rank.
        num_experts: scores of a token, in float32.
    """

    topk: int
    inner: float
    shared: float
    num_experts: int


def _mixture(args: argparse.Namespace) -> Mixture | None:
    experts, tp = ExpertShape.of(args), args.tensor_model_parallel_size
    if experts is None:
        return None
    etp = args.expert_tensor_parallel_size or tp
    shared = (experts.shared_size or 0) / tp
    # Ranks that share the positions of a row also gather them for split experts.
    topk = experts.topk * etp if etp > 1 and args.sequence_parallel else experts.topk
    return Mixture(topk, experts.hidden_size / etp, shared, experts.num_experts)


def layer_sizes(args: argparse.Namespace, fp8: bool) -> Sizes:
    """Read the sizes from Megatron's arguments.

    Args:
        args: Megatron's validated arguments.
        fp8: whether passes with gradients compute in FP8.

    Returns:
        The sizes.
    """
    tp, groups = args.tensor_model_parallel_size, query_groups(args)
    selective = args.recompute_granularity == "selective"
    return Sizes(
        width=2 if args.bf16 or args.fp16 else 4,
        hidden=args.hidden_size,
        part=args.hidden_size / (tp if args.sequence_parallel else 1),
        query=args.num_attention_heads * args.kv_channels / tp,
        key_value=2 * groups * args.kv_channels / tp,
        inner=args.ffn_hidden_size / tp,
        vocabulary=args.padded_vocab_size / tp,
        grouped=groups != args.num_attention_heads,
        normed=bool(args.qk_layernorm),
        with_te=args.transformer_impl == "transformer_engine",
        cp=args.context_parallel_size,
        fp8=fp8,
        again=tuple(args.recompute_modules or ("core_attn",)) if selective else (),
        mixture=_mixture(args),
    )


def _of_attention(sizes: Sizes, *, by_te: bool) -> float:
    """Numbers per position that the attention keeps: of inputs, rotated or not, and its output."""
    query, pair = sizes.query, sizes.key_value
    rotated = query + pair / 2
    # Norms keep the projection, and of grouped heads the queries that are copied out of it (on
    # CPUs what they make of both, too).
    norms = query + pair + (query if sizes.grouped else 0.0) if sizes.normed else 0.0
    if sizes.cp > 1:
        # Keys and values of all ranks, for every head where heads share them.
        whole = 2 * query if sizes.grouped else pair
        return query + sizes.cp * whole + query + norms
    if by_te and "core_attn" not in sizes.again:
        # Its kernel gets the values as a tensor of their own.
        return query + pair + query + norms
    if not by_te and sizes.grouped:
        # PyTorch's kernel gets keys and values once for every head.
        return query + 2 * query + query + norms
    # Values are a part of the projection, which stays whole beside the rotated queries and keys.
    return query + pair + rotated + query


def _of_inputs(sizes: Sizes, number: int) -> float:
    """Numbers per position that linear layers keep of their inputs, outputs of norms."""
    return number * sizes.part * (1 / sizes.width if sizes.fp8 else 1)


def _of_feed_forward(sizes: Sizes) -> tuple[float, float]:
    """Numbers per position that the feed-forward part keeps: around it, and inside."""
    if sizes.mixture is not None:
        return _of_mixture(sizes, sizes.mixture)
    if "mlp" in sizes.again:
        # Transformer Engine's part has the norm inside.
        around = 0.0 if sizes.with_te or "layernorm" in sizes.again else sizes.part
        return around, 0.0
    around = 0.0 if "layernorm" in sizes.again and not sizes.with_te else _of_inputs(sizes, 1)
    product = sizes.inner * (1 / sizes.width if sizes.fp8 else 1)
    return around, 2 * sizes.inner + product


def _of_mixture(sizes: Sizes, mixture: Mixture) -> tuple[float, float]:
    """Numbers per position of this rank's part that a mixture keeps: around it, and inside."""
    # Of each expert the token, both halves of the first product, what the activation makes of them
    # and that with its weight; then the expert's output, which goes back to its rank.
    share = sizes.part / sizes.hidden
    routed = mixture.topk * (2 * sizes.hidden + 4 * mixture.inner) * share
    scores = 4 * 4 / sizes.width * mixture.num_experts * share
    return _of_inputs(sizes, 1), routed + scores + 3 * mixture.shared


def layer_kept(sizes: Sizes, tokens: float) -> float:
    """Bytes that one layer keeps for its backward pass.

    Args:
        sizes: of the layers.
        tokens: T.

    Returns:
        Bytes.
    """
    around, inside = _of_feed_forward(sizes)
    first_norm = "layernorm" not in sizes.again or sizes.with_te
    # Inputs of both halves of the layer, and what their norms make of them.
    outside = 2 * sizes.part + (_of_inputs(sizes, 1) if first_norm else 0.0) + around
    # In FP8 the attention keeps its output and the projection a copy of it.
    copy = sizes.query / sizes.width if sizes.fp8 else 0.0
    attention = _of_attention(sizes, by_te=sizes.with_te) + copy
    return sizes.width * tokens * (outside + attention + inside)


def last_layer_kept(sizes: Sizes, tokens: float, head_rows: float) -> float:
    """Bytes that the last layer keeps, which works on the rows that are read after its attention.

    Args:
        sizes: of the layers.
        tokens: T.
        head_rows: r of this rank.

    Returns:
        Bytes.
    """
    around, inside = _of_feed_forward(sizes)
    of_rows = 4 * sizes.query + 2 * sizes.part + around + inside
    # Its attention is PyTorch's in any case.
    attention = _of_attention(sizes, by_te=False) - sizes.query
    of_all = sizes.part + _of_inputs(sizes, 1) + attention
    return sizes.width * (tokens * of_all + head_rows * of_rows)


def layer_transient(sizes: Sizes, tokens: float) -> float:
    """Bytes that the backward pass of one layer takes beside what was kept."""
    again = 3 * sizes.inner + sizes.part if "mlp" in sizes.again else 0.0
    inner = 3 * sizes.inner
    if sizes.mixture is not None:
        inner = _of_mixture(sizes, sizes.mixture)[1]
    needed = inner + sizes.hidden + 2 * sizes.part + again
    return sizes.width * tokens * needed


def head_memory(
    sizes: Sizes, head_rows: float, fused: bool, frozen: bool = False, chunk: int | None = None
) -> float:
    """Bytes of the head's forward and backward pass.

    Logits are float32 (model/float_logits.py). The cross entropy works in place: its gradient takes
    the place of the logits; the backward pass gets the gradient in its weights' type.

    Args:
        sizes: of the layers.
        head_rows: r.
        fused: whether the weight gradient is added to the buffer in parts.
        frozen: whether the weight has no gradient.
        chunk: rows whose logits stand at a time; None for all.

    Returns:
        Bytes: logits and their gradient, states and theirs, and the weight's gradient.
    """
    entry = 4 + (sizes.width if sizes.width < 4 else 0)
    rows = head_rows if chunk is None else min(head_rows, chunk)
    fused = fused or chunk is not None
    of_weight = sizes.vocabulary * sizes.hidden * sizes.width
    if frozen:
        of_weight = 0.0
    elif fused:
        of_weight = min(_BLOCK, sizes.vocabulary) * sizes.hidden * 4
    # What one block's exponentials take stands beside the logits, before their gradient does.
    logits = sizes.vocabulary * rows * entry
    block = min(sizes.vocabulary * rows, BLOCK) * 4
    logits = max(logits, sizes.vocabulary * rows * 4 + block)
    return logits + head_rows * 3 * sizes.hidden * sizes.width + of_weight


def forward_memory(sizes: Sizes, tokens: float) -> float:
    """Bytes of a pass without gradients through one layer, the one that is largest inside it."""
    whole = sizes.query + sizes.key_value
    repeated = 2 * sizes.query if sizes.grouped else 0.0
    attention = whole + 2 * sizes.query + sizes.key_value / 2 + repeated + sizes.hidden
    # Both projections, the gate's activation and the product; compilers may spare one of them.
    feed_forward = 4 * sizes.inner + sizes.part
    if sizes.mixture is not None:
        feed_forward = _of_mixture(sizes, sizes.mixture)[1]
    return sizes.width * tokens * (max(attention, feed_forward) + 2 * sizes.part)


def lasting_buffers(args: argparse.Namespace, sizes: Sizes, tokens: float, fused: bool) -> float:
    """Bytes that libraries keep from call to call, apart from their reserve.

    Args:
        args: Megatron's validated arguments.
        sizes: of the layers.
        tokens: most positions of all rows of a micro-batch.
        fused: whether weight gradients are added to the buffer where they are computed.

    Returns:
        Bytes.
    """
    if not sizes.with_te:
        # Megatron's layers gather into one buffer.
        gathers = args.sequence_parallel and args.tensor_model_parallel_size > 1
        return sizes.width * tokens * sizes.hidden if gathers else 0.0
    if not fused:
        return float(_WORKSPACE)
    # For autograd, which wants a gradient of each weight: one per shape, in Transformer Engine's
    # ``module/base.py``.
    h = sizes.hidden
    shapes = {
        (sizes.query + sizes.key_value, h),
        (h, sizes.query),
        (2 * sizes.inner, h),
        (h, sizes.inner),
    }
    return float(_WORKSPACE + sizes.width * sum(rows * columns for rows, columns in shapes))
