"""What the entry points share: start-up, the model handle, inference mode, user errors."""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.training import get_args
from megatron.training.global_vars import destroy_global_vars
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_espo import device, megatron_patches
from megatron_espo.adapters.base import load_adapters, load_base
from megatron_espo.config import DiffusionConfig
from megatron_espo.console import Output, rank_log, say
from megatron_espo.data.atomic_folder import is_disk_full
from megatron_espo.data.tokenizer import load_tokenizer, special_ids
from megatron_espo.errors import UserError
from megatron_espo.model import fp8
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.provider import model_provider
from megatron_espo.parallel.layout import current_layout
from megatron_espo.passes.block_mask import block_attention
from megatron_espo.passes.shapes import few_widths
from megatron_espo.recipes import last_value
from megatron_espo.startup.arguments import config_from_args


def run_entry_point(main: Callable[[Sequence[str]], None]) -> None:
    """Run an entry point; what a user can do wrong ends with one sentence and exit status 2.

    Args:
        main: gets the command line without the program name.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        _end_with(error)
    except Exception as error:
        if not is_disk_full(error):
            raise
        _end_with(UserError(_full_disk(error)))
    except SystemExit as end:
        if end.code in (None, 0) and {"-h", "--help"}.intersection(sys.argv):
            # Taking apart what was imported would be a third of the time. A training that Megatron
            # ends like this has more to end.
            _leave(0)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _full_disk(error: Exception) -> str:
    """Say which disk is full, as far as the error knows it."""
    known = getattr(error, "filename", None)
    flags = ("--save", "--tensorboard-dir", "--out", "--output-prefix")
    given = [f"{flag} {value}" for flag in flags if (value := last_value(sys.argv, flag))]
    where = known or " or ".join(given) or os.getcwd()
    return f"{where}: no space left on its disk; make room and start the same command again."


def _end_with(error: UserError) -> NoReturn:
    """Print a user's error, for torchrun too, and end with status 2."""
    _tell_torchrun(f"error: {error}")
    if int(os.environ.get("RANK", "0")) != 0:
        # Every rank finds the same mistake in the same data, and rank 0 says so. torchrun ends
        # the others when the first one ends: let that be rank 0, unless it is well.
        time.sleep(5)
    print(f"error: {error}", file=sys.stderr, flush=True)
    # No atexit handlers: other ranks may never reach the collectives that those wait for.
    _leave(2)


def _tell_torchrun(message: str) -> None:
    """Leave the reason of the end for torchrun, whose own report is the last that is printed."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    # The form that PyTorch's own handler of errors writes, without a stack.
    reason = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": reason}), encoding="utf-8")


def keep_log(output: Output, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Keep what a run prints in its folder, and say where.

    Args:
        output: what is captured so far.
        args: Megatron's arguments; without --save nothing is kept.
        argv: the command line without the program name.

    Raises:
        UserError: The folder cannot be written.
    """
    log = None if args.save is None else rank_log(args.save)
    output.settle(log, [*sys.orig_argv[:1], *sys.argv[:1], *argv], args.verbose)
    if args.rank == 0 and not args.verbose:
        where = "is kept nowhere without --save" if log is None else f"is in {log}"
        say(f"What Megatron prints {where}; --verbose shows it here.")


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def initialize_process_groups(args: argparse.Namespace) -> Store | None:
    """Start torch.distributed and Megatron's groups where Megatron itself needs CUDA for it.

    Args:
        args: Megatron's arguments.

    Returns:
        The store for Megatron's own start-up with CUDA; None leaves the choice to PyTorch.
    """
    if not args.async_save:
        megatron_patches.report_in_this_process()
    store = _rendezvous(args)
    if device.has_cuda():
        return store
    # A model before this one in the process may have made the groups.
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            store=store,
            rank=args.rank,
            world_size=args.world_size,
            timeout=timedelta(minutes=args.distributed_timeout_minutes),
        )
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        )
    return store


def start_anew() -> None:
    """Forget what Megatron keeps of a start-up, for another one in this process.

    Process groups stay: models that were built before compute with them.
    """
    destroy_global_vars()
    unset_num_microbatches_calculator()
    destroy_rerun_state_machine()


def _rendezvous(args: argparse.Namespace) -> Store | None:
    """Choose the store through which the ranks find each other."""
    if "MASTER_ADDR" not in os.environ:
        return HashStore()  # started alone, without torchrun: needs no port
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("LOCAL_WORLD_SIZE") != str(args.world_size):
        # Agents of several nodes count restarts differently.
        return None
    # torchrun keeps its store when it restarts the ranks, and in it the addresses of those that
    # are gone.
    store, _, _ = next(rendezvous("env://", args.rank, args.world_size))
    return PrefixStore(f"restart/{restarts}", store)


def build_model(*args: Any, **settings: Any) -> Any:
    """Build one pipeline stage; of a model with adapters with what these start from.

    Args:
        *args: see :func:`model_provider`.
        **settings: likewise.

    Returns:
        The stage.
    """
    model, own = model_provider(*args, **settings), get_args()
    if own.lora_rank is not None:
        load_base(model, os.path.join(own.lora_base, own.lora_base_mark))
        if own.lora_start is not None:
            load_adapters(model, own.lora_start)
    return model


def sequence_split(args: argparse.Namespace) -> int:
    """Count the ranks that share the positions of a row."""
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return int(tp * args.context_parallel_size)


def pad_multiple(args: argparse.Namespace) -> int:
    """Positions per row must be a multiple of this: ranks that share them, FP8 tiles."""
    rows = getattr(args, "dpo_rows_per_batch", None)
    if rows is None:
        rows = math.gcd(getattr(args, "espo_rows_per_batch", 0), args.rollout_micro_batch_size)
    return fp8.sequence_multiple(
        args.fp8_recipe if args.fp8 else None,
        sequence_split(args),
        rows,
    )


def block_length(args: argparse.Namespace) -> int | None:
    """Say how many tokens a block of the model has; None where all positions see each other.

    Args:
        args: arguments with the model's settings.
    """
    blocks = block_attention(config_from_args(DiffusionConfig, args))
    return None if blocks is None else blocks.size


def diffusion_model(
    chunks: Sequence[torch.nn.Module], prompts: Iterable[Sequence[int]] = ()
) -> DiffusionModel:
    """Describe the built model for sampling and likelihoods.

    Args:
        chunks: this rank's model chunks.
        prompts: see :func:`few_shapes`.

    Returns:
        The handle.
    """
    args = get_args()
    ids = special_ids(load_tokenizer(args.tokenizer_model), args.mask_token_id)
    return DiffusionModel(
        chunks=tuple(chunks),
        mask_token_id=args.mask_token_id,
        pad_token_id=ids.pad_token_id,
        stop_token_ids=tuple(args.stop_token_ids),
        eos_token_id=ids.eos_token_id,
        vocab_size=args.vocab_size,
        logit_shift=args.logit_shift,
        pad_multiple=pad_multiple(args),
        device=device.current_device(),
        layout=current_layout(),
        widths=few_shapes(args, prompts),
        blocks=block_attention(config_from_args(DiffusionConfig, args)),
    )


def keeps_graphs(args: argparse.Namespace) -> bool:
    """Whether attention keeps a graph for every shape of a micro-batch.

    Args:
        args: Megatron's arguments.

    Returns:
        False on a CPU, and where PyTorch's kernels attend (plain layers, context parallelism; see
        model/attention.py).
    """
    return would_keep_graphs(args) and device.has_cuda()


def would_keep_graphs(args: argparse.Namespace) -> bool:
    """Whether attention would keep a graph for every shape on GPUs, which a plan is for."""
    return bool(args.transformer_impl == "transformer_engine" and args.context_parallel_size == 1)


def few_shapes(
    args: argparse.Namespace,
    prompts: Iterable[Sequence[int]] = (),
    completions: Sequence[int] = (),
) -> tuple[int, ...]:
    """Choose the widths of micro-batches: a few where attention keeps a graph for every shape.

    Args:
        args: Megatron's arguments.
        prompts: those that there will be, if they are known, the same on every rank: the widths
            lie between the shortest row and the longest, not up to --seq-length.
        completions: lengths of completions; that of a rollout if empty.

    Returns:
        The widths; none where any will do.
    """
    if not keeps_graphs(args):
        return ()
    completions = completions or [args.rollout_completion_length]
    lengths = [len(prompt) for prompt in prompts]
    shortest, longest = min(completions) + 1, args.seq_length
    if lengths:
        shortest = min(completions) + max(min(lengths), 1)
        longest = min(max(completions) + max(lengths), longest)
    return few_widths(shortest, longest, pad_multiple(args))


@contextlib.contextmanager
def inference_mode(chunks: Sequence[torch.nn.Module], optimizer: Any) -> Iterator[None]:
    """Evaluate the model between updates: evaluation mode, gathered parameters, no hooks.

    With overlapped gathers the parameters are gathered here, unless no step was made since they
    were last.

    Args:
        chunks: this rank's model chunks.
        optimizer: Megatron's optimizer, or None.
    """
    from megatron.training.training import (
        disable_forward_pre_hook,
        enable_forward_pre_hook,
        should_disable_forward_pre_hook,
    )

    hooked = optimizer is not None and should_disable_forward_pre_hook(get_args())
    hooked = hooked and all(getattr(c, "remove_forward_pre_hook_handles", None) for c in chunks)
    if hooked:
        disable_forward_pre_hook(chunks, param_sync=not _are_gathered(chunks))
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)
        if hooked:
            enable_forward_pre_hook(chunks)


def _are_gathered(chunks: Sequence[Any]) -> bool:
    """Whether this rank holds the newest parameters of all ranks.

    Megatron marks a group of parameters when its gather starts, and takes the mark off when the
    group's gradient is reduced, which is before every optimizer step.
    """
    groups = [
        group
        for chunk in chunks
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
    ]
    return all(
        group.param_gather_dispatched and group.param_gather_handle is None for group in groups
    )
