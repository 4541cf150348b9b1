"""The linear projections that can be adapted: their names, and where Megatron packs them.

PEFT adapts the layers of a published model, in which q, k and v are three. Megatron computes them
as one; each still gets matrices of its own here, so that any choice of names trains the very
adapter that PEFT would, and a folder of PEFT's is these tensors under other names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_espo.errors import UserError


@dataclass(frozen=True)
class Projection:
    """A projection of the model.

    Attributes:
        name: as Llama, Qwen and PEFT's users call it.
        layer: Megatron's linear layer that holds it.
        aliases: other families' names of it.
        splits: what tensor-parallel ranks split: rows of the weight (outputs), or columns (inputs).
    """

    name: str
    layer: str
    aliases: tuple[str, ...] = ()
    splits: Literal["rows", "columns"] = "rows"


# In the order in which Megatron packs them.
PROJECTIONS = (
    Projection("q_proj", "linear_qkv"),
    Projection("k_proj", "linear_qkv"),
    Projection("v_proj", "linear_qkv"),
    Projection("o_proj", "linear_proj", ("attn_out",), "columns"),
    Projection("gate_proj", "linear_fc1", ("ff_proj", "gate")),
    Projection("up_proj", "linear_fc1", ("up",)),
    Projection("down_proj", "linear_fc2", ("ff_out", "down"), "columns"),
    Projection("lm_head", "output_layer", ("head",)),
)
HEAD = "lm_head"
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head."""

_BY_NAME = {name: p for p in PROJECTIONS for name in (p.name, *p.aliases)}


def targets_of(names: Sequence[str] | None, gated: bool = True) -> tuple[str, ...]:
    """Read the names of the projections to adapt.

    Args:
        names: names or aliases; None and "all-linear" stand for all but the head.
        gated: whether the model's feed-forward part has a gate.

    Returns:
        Their names in the order of :data:`PROJECTIONS`, each once.

    Raises:
        UserError: one is unknown, or the model has no such projection.
    """
    chosen: set[str] = set()
    for name in names or [ALL_LINEAR]:
        if name == ALL_LINEAR:
            chosen.update(p.name for p in PROJECTIONS if p.name != HEAD)
            chosen.difference_update(() if gated else ("gate_proj",))
        elif name not in _BY_NAME:
            known = ", ".join("/".join((p.name, *p.aliases)) for p in PROJECTIONS)
            raise UserError(
                f"--lora-targets {name}: no projection is called so; choose from {known}, or "
                f"{ALL_LINEAR}."
            )
        else:
            chosen.add(_BY_NAME[name].name)
    if "gate_proj" in chosen and not gated:
        raise UserError("--lora-targets gate_proj: this model has no gate; leave it out.")
    return tuple(p.name for p in PROJECTIONS if p.name in chosen)


def in_layer(layer: str, targets: Sequence[str]) -> tuple[str, ...]:
    """Say which of the targets one of Megatron's layers holds, in packed order."""
    return tuple(p.name for p in PROJECTIONS if p.layer == layer and p.name in targets)
