"""ESPO training: ``torchrun -m megatron_espo.training.espo [Megatron flags] [--espo-* flags]``."""

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_signal_handler, get_tensorboard_writer
from megatron.training import training as megatron_training
from megatron.training.checkpointing import save_checkpoint

from megatron_espo.arguments import config_from_args, initialize_arguments
from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.data.tokenizer import load_tokenizer
from megatron_espo.device import current_device
from megatron_espo.model.provider import model_provider
from megatron_espo.rl.prompts import encode_examples
from megatron_espo.rl.reference import ReferencePolicy
from megatron_espo.rl.trainer import TaskData, Trainer, train
from megatron_espo.tasks import Task, load_task
from megatron_espo.training.setup import (
    diffusion_model,
    inference_mode,
    initialize_process_groups,
    run_entry_point,
)


def views_per_completion(espo: EspoConfig) -> int:
    """Count the model rows behind one ELBO: a coupled draw has two views."""
    return espo.num_mc * (2 if espo.elbo_estimator == "coupled" else 1)


def prepare_arguments(args: argparse.Namespace) -> None:
    """Check ESPO's settings and derive Megatron's batch arithmetic from them.

    Args:
        args: parsed arguments; batch sizes and step counts are filled in.

    Raises:
        ValueError: naming the flag.
    """
    espo, rollout = config_from_args(EspoConfig, args), config_from_args(RolloutConfig, args)
    espo.validate()
    rollout.validate(args.logit_shift)
    if args.attention_dropout or args.hidden_dropout:
        raise ValueError(
            "dropout would make the ratio of unchanged weights differ from 1; pass "
            "--attention-dropout 0 --hidden-dropout 0."
        )
    if args.calculate_per_token_loss:
        raise ValueError("--calculate-per-token-loss: ESPO averages over sequences; leave it out.")
    if args.seq_length is None:
        raise ValueError("--seq-length is missing: the most tokens of prompt and completion.")
    if args.seq_length <= rollout.completion_length:
        raise ValueError(
            f"--seq-length {args.seq_length} leaves no room for a prompt before "
            f"--rollout-completion-length {rollout.completion_length}."
        )
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    model_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    dp = max(args.world_size // model_size, 1)
    if espo.prompts_per_rollout % dp:
        raise ValueError(
            f"--espo-prompts-per-rollout {espo.prompts_per_rollout} cannot be split over {dp} "
            f"data-parallel ranks; use a multiple of {dp}."
        )
    views = views_per_completion(espo)
    rows = espo.completions_per_rollout // dp * views
    if args.micro_batch_size is None:
        args.micro_batch_size = views
    if rows % args.micro_batch_size:
        raise ValueError(
            f"--micro-batch-size {args.micro_batch_size} does not divide the {rows} rows of a "
            f"rank's update ({espo.completions_per_rollout // dp} completions x {views} views)."
        )
    if espo.gradient == "joint" and args.micro_batch_size % views:
        raise ValueError(
            f"--espo-gradient joint keeps the {views} views of a completion together; make "
            f"--micro-batch-size {args.micro_batch_size} a multiple of {views}, or use two_pass."
        )
    batches = rows // args.micro_batch_size
    virtual = (
        args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
    )
    if virtual and batches % args.pipeline_model_parallel_size:
        raise ValueError(
            f"virtual pipeline stages take micro-batches in rounds of "
            f"{args.pipeline_model_parallel_size}, but an update has {batches}; change "
            f"--micro-batch-size {args.micro_batch_size}."
        )
    # Megatron's schedules count samples: its global batch is the completions of one update.
    if args.global_batch_size not in (None, espo.completions_per_rollout):
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} follows from --espo-prompts-per-rollout "
            f"x --espo-group-size = {espo.completions_per_rollout}; leave it out."
        )
    args.global_batch_size = espo.completions_per_rollout
    args.espo_rows_per_batch, args.micro_batch_size = args.micro_batch_size, 1
    args.train_iters = espo.num_rollouts * espo.updates_per_rollout
    # Megatron's re-run machinery drives Megatron's own loop; without it a NaN gradient is an error.
    args.rerun_mode = "disabled"
    if espo.train_data is None:
        raise ValueError("--espo-train-data is missing: the task's problems as JSONL.")


def load_task_data(
    task: Task, path: str | None, tokenizer: Any, args: argparse.Namespace, count: int = 0
) -> TaskData | None:
    """Read a task's problems and tokenize their prompts.

    Args:
        task: the task.
        path: JSONL file, or None.
        tokenizer: the tokenizer.
        args: Megatron's arguments.
        count: most problems to take; 0 takes all.

    Returns:
        The data, or None without a path.
    """
    if path is None:
        return None
    examples = task.read(path)
    examples = examples[:count] if count else examples
    room = args.seq_length - args.rollout_completion_length
    return TaskData(examples, encode_examples(tokenizer, examples, room, path))


def main(argv: Sequence[str]) -> None:
    """Run ESPO from the command line.

    Args:
        argv: flags.
    """
    args = initialize_arguments(argv, prepare_arguments)
    espo, rollout = config_from_args(EspoConfig, args), config_from_args(RolloutConfig, args)
    task = load_task(espo.task, flag="--espo-task")
    tokenizer = load_tokenizer(args.tokenizer_model)
    train_data = load_task_data(task, espo.train_data, tokenizer, args)
    eval_data = load_task_data(task, espo.eval_data, tokenizer, args, espo.eval_samples)
    assert train_data is not None
    initialize_process_groups(args)
    megatron_training.initialize_megatron()
    chunks, optimizer, scheduler = megatron_training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder, model_provider, checkpointing_context={}
    )
    _connect_schedule(chunks, optimizer)
    for chunk in chunks:
        chunk.train()
    first_step = args.iteration
    if first_step % espo.updates_per_rollout:
        raise ValueError(
            f"--load {args.load}: step {first_step} is not the end of a rollout of "
            f"--espo-updates-per-rollout {espo.updates_per_rollout}; keep the run's value."
        )
    reference = ReferencePolicy(chunks) if espo.kl_coef > 0.0 else None
    if reference is not None and first_step > 0:
        reference.load(_reference_folder(args.load, first_step))
    saver = _Saver(chunks, optimizer, scheduler, reference)
    train(
        Trainer(
            model=diffusion_model(chunks),
            reference=reference,
            optimizer=optimizer,
            scheduler=scheduler,
            tokenizer=tokenizer,
            task=task,
            train_data=train_data,
            eval_data=eval_data,
            espo=espo,
            rollout=rollout,
            seed=args.seed,
            rows_per_batch=args.espo_rows_per_batch,
            writer=get_tensorboard_writer(),
            inference=partial(inference_mode, chunks, optimizer),
            save=saver.save_if_due,
            should_stop=partial(_should_stop, started=time.monotonic()),
        ),
        first_step,
    )
    if get_tensorboard_writer() is not None:
        get_tensorboard_writer().flush()


def _connect_schedule(chunks: Sequence[torch.nn.Module], optimizer: Any) -> None:
    """Give Megatron's schedules what its own training loop gives them."""
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


def _reference_folder(save: str, step: int) -> str:
    return os.path.join(save, "reference", f"iter_{step:07d}")


def _should_stop(step: int, started: float) -> bool:
    """Honour Megatron's flags for ending a run early; all ranks agree on the answer."""
    args = get_args()
    if args.exit_signal_handler and any(get_signal_handler().signals_received()):
        return True
    if args.exit_interval and step % args.exit_interval == 0:
        return True
    if args.exit_duration_in_mins:
        over = time.monotonic() - started > 60 * args.exit_duration_in_mins
        votes = torch.tensor([int(over)], device=current_device())
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        return bool(votes.item())
    return False


class _Saver:
    """Saves at the ends of rollouts, the reference policy first.

    Megatron's tracker file is written last: a checkpoint that was interrupted is never the latest.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        reference: ReferencePolicy | None,
    ) -> None:
        self._parts = (list(chunks), optimizer, scheduler)
        self._reference = reference
        self._saved = get_args().iteration

    def save_if_due(self, step: int, stop: bool) -> None:
        """Save when the interval has passed, at the end, and when the run was told to stop."""
        args = get_args()
        args.iteration = step
        args.consumed_train_samples = step * args.global_batch_size
        due = step // args.save_interval > self._saved // args.save_interval
        if args.save is None or not (due or stop or step == args.train_iters):
            return
        if self._reference is not None:
            self._reference.save(_reference_folder(args.save, step))
        save_checkpoint(step, *self._parts, 0)
        self._saved = step


if __name__ == "__main__":
    run_entry_point(main)
