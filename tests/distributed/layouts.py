"""The layouts that are compared with one rank, and the table of what was measured."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist


class Case(NamedTuple):
    """A layout of the four ranks; what tp and pp leave is data parallel."""

    tp: int
    pp: int
    flags: tuple[str, ...] = ()
    # Rows of a micro-batch: in pre-training, and views in ESPO (one rank: 4 and 8).
    micro: int = 2
    views: int = 4
    # Dream's logit shift instead of LLaDA's plain prediction.
    shift: bool = False
    # Ranks that share the positions of a row.
    cp: int = 1
    # Model and sampling are those of another case: two samplers say enough.
    few_samplers: bool = False
    # With LoRA adapters, which alone are trained.
    lora: bool = False


_SP, _DO = "--sequence-parallel", "--use-distributed-optimizer"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
_OVERLAP = (_DO, "--overlap-grad-reduce", "--overlap-param-gather")
_VPP = ("--num-layers-per-virtual-pipeline-stage", "1")
# Micro-batches have more rows, and no multiple of these.
_CHUNKS = ("--head-chunk", "5")

CASES = {
    "dp 4": Case(1, 1),
    "tp 2, dp 2": Case(2, 1),
    "tp 4": Case(4, 1),
    "pp 2, dp 2": Case(1, 2),
    "pp 4": Case(1, 4),
    "tp 2, pp 2": Case(2, 2),
    "tp 4, sequence parallel": Case(4, 1, (_SP,)),
    "tp 2, pp 2, sequence parallel, distributed optimizer": Case(2, 2, (_SP, _DO)),
    "pp 2 with 2 virtual stages, dp 2": Case(1, 2, _VPP),
    "dp 4, distributed optimizer": Case(1, 1, (_DO,), few_samplers=True),
    "dp 4, distributed optimizer, overlapped": Case(1, 1, _OVERLAP, few_samplers=True),
    "tp 2, dp 2, distributed optimizer, overlapped": Case(2, 1, _OVERLAP, few_samplers=True),
    "cp 2, dp 2": Case(1, 1, cp=2),
    "cp 4, distributed optimizer": Case(1, 1, (_DO,), cp=4),
    "tp 2, cp 2, sequence parallel": Case(2, 1, (_SP,), cp=2),
    "cp 2, pp 2, selective recomputation": Case(
        1, 2, ("--recompute-granularity", "selective"), cp=2, few_samplers=True
    ),
    "cp 2, pp 2, full recomputation": Case(1, 2, tuple(_FULL), cp=2, few_samplers=True),
    "tp 2, dp 2, micro-batch 1": Case(2, 1, (), 1, 2, few_samplers=True),
    "tp 2, pp 2, full recomputation": Case(2, 2, tuple(_FULL), few_samplers=True),
    "tp 2, dp 2, selective recomputation": Case(
        2, 1, ("--recompute-granularity", "selective"), few_samplers=True
    ),
    "tp 2, pp 2, sequence parallel, head in chunks": Case(2, 2, (_SP, *_CHUNKS), few_samplers=True),
    "cp 2, dp 2, overlapped, head in chunks": Case(
        1, 1, (*_OVERLAP, *_CHUNKS), cp=2, few_samplers=True
    ),
    "logit shift: tp 2, sequence parallel, dp 2": Case(2, 1, (_SP,), shift=True),
    "logit shift: tp 2, pp 2": Case(2, 2, shift=True),
    "logit shift: cp 2, tp 2": Case(2, 1, cp=2, shift=True),
    "LoRA: tp 2, dp 2": Case(2, 1, lora=True, few_samplers=True),
    "LoRA: tp 4, sequence parallel": Case(4, 1, (_SP,), lora=True, few_samplers=True),
    "LoRA: tp 2, dp 2, head in chunks": Case(2, 1, _CHUNKS, lora=True, few_samplers=True),
    "LoRA: tp 2, pp 2, full recomputation": Case(2, 2, tuple(_FULL), lora=True, few_samplers=True),
    "LoRA: pp 2 with 2 virtual stages, dp 2": Case(1, 2, _VPP, lora=True, few_samplers=True),
    "LoRA: cp 2, tp 2, sequence parallel, distributed optimizer": Case(
        2, 1, (_SP, _DO), cp=2, lora=True, few_samplers=True
    ),
    "LoRA: dp 4, distributed optimizer, overlapped": Case(
        1, 1, _OVERLAP, lora=True, few_samplers=True
    ),
}


class BlockCase(NamedTuple):
    """A layout of a model with norms of queries and keys, and how it attends."""

    kind: str
    tp: int
    pp: int
    flags: tuple[str, ...] = ()
    micro: int = 2
    cp: int = 1


_SELECTIVE = ("--recompute-granularity", "selective")

BLOCK_CASES = {
    "QK norm: tp 2, sequence parallel, dp 2": BlockCase("full", 2, 1, (_SP,)),
    "QK norm: cp 2, pp 2": BlockCase("full", 1, 2, cp=2),
    "blocks: tp 4, sequence parallel": BlockCase("block-causal", 4, 1, (_SP,)),
    "blocks: tp 2, pp 2, distributed optimizer": BlockCase("block-causal", 2, 2, (_DO,)),
    "blocks: pp 4": BlockCase("block-causal", 1, 4),
    "blocks: pp 2 with 2 virtual stages, dp 2": BlockCase("block-causal", 1, 2, _VPP),
    "blocks: cp 2, tp 2, sequence parallel": BlockCase("block-causal", 2, 1, (_SP,), cp=2),
    "blocks: cp 2, pp 2, full recomputation": BlockCase("block-causal", 1, 2, tuple(_FULL), cp=2),
    "causal context, shift: tp 2, sequence parallel, dp 2": BlockCase(
        "context-causal", 2, 1, (_SP,)
    ),
    "causal context, shift: tp 2, pp 2, full recomputation": BlockCase(
        "context-causal", 2, 2, tuple(_FULL)
    ),
    "causal context, shift: cp 2, dp 2, selective recomputation": BlockCase(
        "context-causal", 1, 1, _SELECTIVE, cp=2
    ),
}


class MoeCase(NamedTuple):
    """A layout of a model with mixtures of experts."""

    tp: int
    pp: int
    ep: int
    etp: int = 1
    flags: tuple[str, ...] = ()
    micro: int = 2
    cp: int = 1
    # How tokens attend.
    kind: str = "full"


_ALLGATHER = ("--moe-token-dispatcher-type", "allgather")

MOE_CASES = {
    "experts: dp 4": MoeCase(1, 1, 1),
    "experts: ep 2, dp 4": MoeCase(1, 1, 2),
    "experts: ep 4, dp 4, distributed optimizer, overlapped": MoeCase(1, 1, 4, flags=_OVERLAP),
    "experts: ep 2, dp 4, allgather": MoeCase(1, 1, 2, flags=_ALLGATHER),
    "experts: ep 2, tp 2, dp 2": MoeCase(2, 1, 2, flags=(_SP,)),
    "experts: ep 4, tp 2, dp 2, allgather": MoeCase(2, 1, 4, flags=(_SP, *_ALLGATHER)),
    "experts: etp 2, tp 2, dp 2": MoeCase(2, 1, 1, 2, (_SP,)),
    "experts: tp 2, dp 2": MoeCase(2, 1, 1, 1, (_SP,)),
    "experts: ep 2, etp 2, tp 2, dp 2": MoeCase(2, 1, 2, 2, (_SP, _DO)),
    "experts: ep 2, pp 2, dp 2": MoeCase(1, 2, 2),
    "experts: ep 2, tp 2, pp 2, full recomputation": MoeCase(2, 2, 2, flags=(_SP, *_FULL)),
    "experts: ep 4, cp 2, dp 2": MoeCase(1, 1, 4, cp=2),
    "experts: blocks, ep 2, pp 2, dp 2": MoeCase(1, 2, 2, kind="block-causal"),
    "experts: blocks, ep 4, tp 2, dp 2": MoeCase(2, 1, 4, flags=(_SP,), kind="block-causal"),
}

COLUMNS = {
    "loss": "loss",
    "norm": "gradient norm",
    "gradient": "gradient tensors",
    "elbo": "ELBO",
    "tokens": "equal tokens",
}
_BEGIN, _END = "<!-- layouts: begin -->", "<!-- layouts: end -->"

# Largest relative difference (of equal tokens: the smallest share) by case and column.
measured: dict[str, dict[str, float]] = defaultdict(dict)


def record(case: str, column: str, value: float) -> None:
    """Remember the worst value of a column."""
    worst = min if column == "tokens" else max
    measured[case][column] = worst(value, measured[case].get(column, value))


def write_table(path: Path) -> None:
    """Put the worst values over all ranks into a Markdown file, between its two marks."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: dict(row) for name, row in measured.items()})
    for row in everyone:
        for case, values in row.items():
            for column, value in values.items():
                record(case, column, value)
    if dist.get_rank() != 0:
        return
    lines = ["| layout | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for case in (*CASES, *BLOCK_CASES, *MOE_CASES):
        row = measured[case]
        cells = [
            "" if c not in row else f"{row[c]:.3f}" if c == "tokens" else f"{row[c]:.1e}"
            for c in COLUMNS
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    text = path.read_text()
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    path.write_text(before + "\n".join([_BEGIN, *lines, _END]) + after)


def write_if_asked() -> None:
    """Write the table to the file that LAYOUT_TABLE names."""
    if path := os.environ.get("LAYOUT_TABLE"):
        write_table(Path(path))
        if dist.get_rank() == 0:
            print(json.dumps(measured, indent=1))
