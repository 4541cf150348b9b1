"""What trainings with a loop of their own set up: ESPO and preference optimization."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer.optimizer import SEPARATE_GRAD_NORM_GROUPS
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from megatron.training import training as megatron_training

from megatron_espo.checkpoint.tracker import resumed_iteration
from megatron_espo.config import MonitorConfig
from megatron_espo.errors import UserError
from megatron_espo.monitor.dashboard import Dashboard
from megatron_espo.monitor.flops import ModelDimensions
from megatron_espo.monitor.hardware import open_gpu
from megatron_espo.monitor.tensorboard import LAYOUT, Chart, begin_events, write_layout
from megatron_espo.monitor.throughput import own_peak_tflops
from megatron_espo.monitor.watch import Watch, WatchState
from megatron_espo.rl.provenance import Settings
from megatron_espo.rl.reference import Reference
from megatron_espo.rl.run import RunState
from megatron_espo.rl.state import ESPO, Checkpoints, load_run_state
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.startup.save_folder import open_keeper
from megatron_espo.startup.setup import build_model, inference_mode, initialize_process_groups
from megatron_espo.startup.stored import reading_checkpoint


class Parts(NamedTuple):
    """What Megatron made for a run.

    Attributes:
        chunks: this rank's model chunks, in training mode.
        optimizer: Megatron's optimizer.
        scheduler: Megatron's learning-rate scheduler.
        check_gradient: whether a gradient that is not finite ends the run.
        inference: context in which the model is evaluated without gradients.
    """

    chunks: Sequence[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    check_gradient: bool
    inference: Callable[[], AbstractContextManager[None]]


def build_parts(args: argparse.Namespace) -> Parts:
    """Start the process groups, and build or load the model with its optimizer.

    Args:
        args: Megatron's arguments, checked.

    Returns:
        The parts; gradients flow through Megatron's schedules from here on.
    """
    # With clipping, the loop looks at the norm of the whole gradient, which the host reads anyway;
    # Megatron waits for each bucket's.
    check_gradient = args.check_for_nan_in_loss_and_grad
    args.check_for_nan_in_loss_and_grad = check_gradient and not args.clip_grad
    store = initialize_process_groups(args)
    megatron_training.initialize_megatron(store=store)
    with reading_checkpoint(args.load if resumed_iteration(args) else args.pretrained_checkpoint):
        chunks, optimizer, scheduler = megatron_training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, build_model, checkpointing_context={}
        )
    connect_schedule(chunks, optimizer)
    for group in SEPARATE_GRAD_NORM_GROUPS:
        # All ranks are asked once, for which the host waits: here, not in the first step.
        optimizer.has_grad_norm_group(group)
    for chunk in chunks:
        chunk.train()
    inference = partial(inference_mode, chunks, optimizer)
    return Parts(chunks, optimizer, scheduler, check_gradient, inference)


def open_checkpoints(
    args: argparse.Namespace,
    parts: Parts,
    reference: Reference | None,
    made_with: Settings,
    saved: Mapping[str, Any] | None,
    kind: str = ESPO,
    charts: Mapping[str, Mapping[str, Chart]] = LAYOUT,
) -> tuple[RunState, Checkpoints]:
    """Take up where a run is, let its event files begin there, and say how it is saved.

    Args:
        args: Megatron's arguments.
        parts: the model with its optimizer.
        reference: the reference policy, or None.
        made_with: settings that checkpoints hold.
        saved: the state of the checkpoint that was loaded, if any.
        kind: of the run, see `rl.state`.
        charts: how TensorBoard groups them.

    Returns:
        Where the run goes on, and what saves it.
    """
    start, writer = (
        load_run_state(args.load, args.iteration, saved, reference),
        get_tensorboard_writer(),
    )
    begin_events(writer, start.step)
    write_layout(writer, charts)
    checkpoints = Checkpoints(
        parts.chunks, parts.optimizer, parts.scheduler, reference, made_with, writer,
        open_keeper(args), kind,
    )  # fmt: skip
    if start.accuracy is not None:
        checkpoints.evaluated(start.step, start.accuracy)
    return start, checkpoints


def open_dashboard(
    args: argparse.Namespace, is_reporter: bool, watch: WatchState | None
) -> Dashboard:
    """Open what a run reports to.

    Args:
        args: Megatron's arguments.
        is_reporter: whether this rank prints.
        watch: what the warnings remember, or None at the start.

    Returns:
        The dashboard.
    """
    return Dashboard(
        writer=get_tensorboard_writer(),
        wandb=get_wandb_writer(),
        is_reporter=is_reporter,
        watch=Watch(watch),
        gpu=open_gpu(),
        dimensions=ModelDimensions.from_args(args),
        devices=args.world_size,
        peak=own_peak_tflops(
            config_from_args(MonitorConfig, args).peak_tflops,
            bits16=args.bf16 or args.fp16,
            fp8=bool(args.fp8),
        ),
    )


def close_reports() -> None:
    """Let what a run has reported reach its files."""
    if (wandb := get_wandb_writer()) is not None:
        wandb.finish()
    if (writer := get_tensorboard_writer()) is not None:
        writer.flush()


class Views(NamedTuple):
    """What an update of a data-parallel rank is made of.

    Attributes:
        number: completions, or pairs.
        each: views of one of them, which stay together where there is one pass.
        what: what one of them is called.
    """

    number: int
    each: int
    what: str


def data_parallel_ranks(args: argparse.Namespace) -> int:
    """Return the copies of the model, before Megatron has worked them out."""
    model_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    return max(args.world_size // (model_size * args.context_parallel_size), 1)


def settle_micro_batches(args: argparse.Namespace, views: Views) -> None:
    """Cut the views of an update into micro-batches: by default one for each completion or pair.

    Args:
        args: parsed arguments.
        views: of the update.

    Raises:
        UserError: they cannot be cut so.
    """
    rows = views.number * views.each
    if args.micro_batch_size is None:
        args.micro_batch_size = views.each
    if rows % args.micro_batch_size:
        raise UserError(
            f"--micro-batch-size {args.micro_batch_size} does not divide the {rows} rows of a "
            f"rank's update ({views.number} {views.what}s x {views.each} views)."
        )


def check_gradient_mode(args: argparse.Namespace, mode: str, views: Views, flag: str) -> None:
    """Check that micro-batches suit the way to the gradient, and virtual stages.

    Args:
        args: parsed arguments, with the views of a micro-batch.
        mode: joint or two_pass.
        views: of the update.
        flag: says the mode.

    Raises:
        UserError: they do not.
    """
    if mode == "joint" and args.micro_batch_size % views.each:
        raise UserError(
            f"{flag} joint keeps the {views.each} views of a {views.what} together; make "
            f"--micro-batch-size {args.micro_batch_size} a multiple of {views.each}, or use "
            "two_pass."
        )
    batches = views.number * views.each // args.micro_batch_size
    virtual = (
        args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
    )
    if virtual and batches % args.pipeline_model_parallel_size:
        raise UserError(
            f"virtual pipeline stages take micro-batches in rounds of "
            f"{args.pipeline_model_parallel_size}, but an update has {batches}; change "
            f"--micro-batch-size {args.micro_batch_size}."
        )


def connect_schedule(chunks: Sequence[torch.nn.Module], optimizer: Any) -> None:
    """Give Megatron's schedules what its own training loop gives them.

    Args:
        chunks: this rank's model chunks.
        optimizer: Megatron's optimizer.
    """
    args, config = get_args(), get_model_config(chunks[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        functions = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = functions if len(functions) > 1 else functions[0]
        if args.align_grad_reduce:
            functions = [chunk.start_grad_sync for chunk in chunks]
            config.grad_sync_func = functions if len(functions) > 1 else functions[0]
    if args.overlap_param_gather and args.align_param_gather:
        functions = [chunk.start_param_sync for chunk in chunks]
        config.param_sync_func = functions if len(functions) > 1 else functions[0]
