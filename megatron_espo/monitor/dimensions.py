"""What the operations of model passes depend on: sizes of the model, adapters, noisy copies."""

import argparse
import math
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of

from megatron_espo.adapters.base import lora_settings
from megatron_espo.adapters.projections import targets_of
from megatron_espo.config import DpoConfig, EspoConfig
from megatron_espo.model.shape import ExpertShape, query_groups
from megatron_espo.objectives import views_per_completion
from megatron_espo.passes.block_mask import BlockAttention


@dataclass(frozen=True)
class ModelDimensions:
    """What the operations of a pass depend on.

    Attributes:
        num_layers: transformer layers.
        hidden_size: channels between layers.
        ffn_hidden_size: channels inside the MLP.
        num_attention_heads: query heads.
        num_query_groups: key/value heads.
        head_dim: channels of one head.
        vocab_size: rows of the output head, without padding.
        gated: whether the MLP has a gate beside its up projection (SwiGLU).
        adapters: parameters of the LoRA adapters of a layer's q, k and v, of its other projections,
            and of the head; None where all weights are trained.
        blocks: how the rows of ELBOs and updates attend where tokens come block by block, with as
            many noisy copies as share a row.
        mixtures: for each layer whether it is a mixture of experts; none in a model without.
        active_size: channels inside the experts that compute a token, the shared one among them.
        num_experts: experts that the router of a mixture scores.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    gated: bool = True
    adapters: tuple[int, int, int] | None = None
    blocks: BlockAttention | None = None
    mixtures: tuple[int, ...] = ()
    active_size: int = 0
    num_experts: int = 0

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "ModelDimensions":
        """Read the dimensions from Megatron's validated arguments."""
        experts = ExpertShape.of(args)
        active = 0 if experts is None else experts.topk * experts.hidden_size
        return cls(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=query_groups(args),
            head_dim=args.kv_channels,
            vocab_size=args.vocab_size,
            gated=bool(args.swiglu),
            adapters=_adapter_parameters(args),
            blocks=_noisy_rows(args),
            mixtures=() if experts is None else experts.layers,
            active_size=0 if experts is None else active + (experts.shared_size or 0),
            num_experts=0 if experts is None else experts.num_experts,
        )

    @property
    def base(self) -> "ModelDimensions":
        """The model without its adapters."""
        return replace(self, adapters=None)


def _noisy_rows(args: argparse.Namespace) -> BlockAttention | None:
    """Read how rows of noisy copies attend, and how many views share one."""
    mask = getattr(args, "attention_mask", None)
    if mask in (None, "full"):
        return None
    blocks = BlockAttention(args.block_size, mask == "context-causal")
    # Only arguments of ESPO and of preference optimization know micro-batches of views.
    views = getattr(args, "dpo_rows_per_batch", None)
    if views is not None:
        dpo = DpoConfig(
            **{field.name: getattr(args, f"dpo_{field.name}") for field in fields_of(DpoConfig)}
        )
        return blocks.with_copies(math.gcd(views, dpo.views_per_completion))
    views = getattr(args, "espo_rows_per_batch", None)
    if views is None:
        return blocks.with_copies(1)
    espo = EspoConfig(
        **{field.name: getattr(args, f"espo_{field.name}") for field in fields_of(EspoConfig)}
    )
    return blocks.with_copies(math.gcd(views, views_per_completion(espo)))


def _adapter_parameters(args: argparse.Namespace) -> tuple[int, int, int] | None:
    lora = lora_settings(args)
    if lora.rank is None:
        return None
    hidden, inner = args.hidden_size, args.ffn_hidden_size
    queries = args.num_attention_heads * args.kv_channels
    pair = query_groups(args) * args.kv_channels
    sides = {
        "q_proj": hidden + queries,
        "k_proj": hidden + pair,
        "v_proj": hidden + pair,
        "o_proj": queries + hidden,
        "lm_head": hidden + args.vocab_size,
    }
    chosen = {
        name: lora.rank * sides.get(name, hidden + inner)
        for name in targets_of(lora.targets, gated=bool(args.swiglu))
    }
    first = sum(chosen.get(name, 0) for name in ("q_proj", "k_proj", "v_proj"))
    head = chosen.get("lm_head", 0)
    return first, sum(chosen.values()) - first - head, head
