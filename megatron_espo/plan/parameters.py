"""Counts the parameters of every pipeline stage on Megatron's own model, built without memory."""

import argparse
import contextlib
import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import global_vars

from megatron_espo.adapters.attach import is_adapter
from megatron_espo.device import CPU_ARGUMENT_DEFAULTS
from megatron_espo.model.provider import model_provider


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank of a pipeline stage.

    Attributes:
        total: all of them.
        trained: those that are trained: all, or the adapters.
        linear: weights of the layers' linear projections, those that FP8 quantises.
        largest: the largest trained one.
        largest_chunk: trained ones of the largest model chunk; all without virtual stages.
        whole_model: those of the stage over all its tensor-parallel ranks, without the rows that
            pad the vocabulary.
        whole_trained: the trained ones of these.
        experts: trained weights of experts, whose optimizer state other ranks share than that of
            the rest.
    """

    total: int
    trained: int
    linear: int
    largest: int
    largest_chunk: int
    whole_model: int
    whole_trained: int
    experts: int = 0


def count_parameters(args: argparse.Namespace) -> list[StageParameters]:
    """Build each pipeline stage on the meta device and count.

    The process groups are those of the planned run, made by torch's "fake" backend, which stands
    for ranks that are not there; this process must have none of its own.

    Args:
        args: Megatron's validated arguments of the planned run.

    Returns:
        The stages in order, as their first tensor-parallel rank holds them.
    """
    described = copy.copy(args)
    # Only describes the model: the local layers hold the same parameters as those of Transformer
    # Engine, which may not be installed here.
    vars(described).update(CPU_ARGUMENT_DEFAULTS, perform_initialization=False)
    for name in ("fp8", "fp4", "fp8_param_gather", "fp8_param", "overlap_p2p_comm"):
        if hasattr(described, name):
            setattr(described, name, None if name in ("fp8", "fp4") else False)
    stages = []
    for stage in range(args.pipeline_model_parallel_size):
        with _fake_groups(described, stage), torch.device("meta"):
            stages.append(_count(described, stage))
    return stages


def _count(args: argparse.Namespace, stage: int) -> StageParameters:
    last = stage == args.pipeline_model_parallel_size - 1
    virtual = args.virtual_pipeline_model_parallel_size
    named, chunks = [], []
    for part in range(virtual or 1):
        with contextlib.redirect_stdout(io.StringIO()):
            chunk = model_provider(
                pre_process=stage == 0 and part == 0,
                post_process=last and part == (virtual or 1) - 1,
                vp_stage=part if virtual else None,
            )
        named += list(chunk.named_parameters())
        chunks.append(sum(w.numel() for w in chunk.parameters() if w.requires_grad))
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    padding = args.padded_vocab_size - args.vocab_size
    whole = trained = 0
    for name, weight in named:
        split = getattr(weight, "tensor_model_parallel", False)
        of_experts = not getattr(weight, "allreduce", True)
        ranks = (etp if of_experts else tp) if split else 1
        size = weight.numel() * ranks * (ep if of_experts else 1)
        if name.endswith(("word_embeddings.weight", "output_layer.weight", "lm_head_b")):
            size -= padding * weight.size(1)
        whole += size
        trained += size if weight.requires_grad else 0
    linear = [
        w for name, w in named if ".linear_" in name and w.dim() == 2 and not is_adapter(name)
    ]
    return StageParameters(
        total=sum(w.numel() for _, w in named),
        trained=sum(w.numel() for _, w in named if w.requires_grad),
        linear=sum(w.numel() for w in linear),
        largest=max((w.numel() for _, w in named if w.requires_grad), default=0),
        largest_chunk=max(chunks),
        whole_model=whole,
        whole_trained=trained,
        experts=sum(
            w.numel() for _, w in named if w.requires_grad and not getattr(w, "allreduce", True)
        ),
    )


@contextlib.contextmanager
def _fake_groups(args: argparse.Namespace, stage: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    pp = args.pipeline_model_parallel_size
    between_stages = (
        args.tensor_model_parallel_size if args.use_tp_pp_dp_mapping else args.world_size // pp
    )
    kept = global_vars._GLOBAL_ARGS
    global_vars.set_args(args)
    dist.init_process_group(
        "fake", store=FakeStore(), rank=stage * between_stages, world_size=args.world_size
    )
    try:
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            pp,
            args.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=False,
        )
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
        global_vars.set_args(kept)
