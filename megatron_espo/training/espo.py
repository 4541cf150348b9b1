"""ESPO training: ``torchrun -m megatron_espo.training.espo [Megatron flags] [--espo-* flags]``."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_espo.checkpoint.tracker import resumed_iteration
from megatron_espo.config import (
    REFERENCE_MIX_INTERVAL,
    EspoConfig,
    MonitorConfig,
    RolloutConfig,
)
from megatron_espo.console import say
from megatron_espo.data.tokenizer import FastTokenizer, load_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.evaluation.problems import TaskData, load_task_data, load_workers
from megatron_espo.model.experts import settle_policy
from megatron_espo.model.fp8 import check_policy_arguments
from megatron_espo.objectives import (
    check_objective,
    chosen_gradient,
    objective_of,
    views_per_completion,
)
from megatron_espo.objectives.advantages import load_advantage
from megatron_espo.rewards.workers import RewardWorkers
from megatron_espo.rl.credit import check_parts
from megatron_espo.rl.provenance import Settings, check_provenance, settings_of
from megatron_espo.rl.reference import reference_policy
from megatron_espo.rl.run import Trainer
from megatron_espo.rl.state import StopRequest, read_state
from megatron_espo.rl.trainer import train
from megatron_espo.startup.argument_checks import check_schedule
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.startup.save_folder import own_save_folder
from megatron_espo.startup.setup import (
    block_length,
    diffusion_model,
    pad_multiple,
    run_entry_point,
)
from megatron_espo.tasks.base import Task, start_line
from megatron_espo.training import entry
from megatron_espo.training.own_loop import (
    Views,
    build_parts,
    check_gradient_mode,
    close_reports,
    data_parallel_ranks,
    open_checkpoints,
    open_dashboard,
    settle_micro_batches,
)


def prepare_arguments(args: argparse.Namespace) -> None:
    """Check ESPO's settings and derive Megatron's batch arithmetic from them.

    Args:
        args: parsed arguments; batch sizes and step counts are filled in.

    Raises:
        UserError: naming the flag.
    """
    _settle_mixing(args)
    espo, rollout = config_from_args(EspoConfig, args), config_from_args(RolloutConfig, args)
    espo.validate()
    rollout.validate(args.logit_shift, pad_multiple(args), block_length(args))
    fitted = objective_of(espo).fitted(rollout, block_length(args))
    if fitted:
        args.espo_objective_args = [*(espo.objective_args or ()), *fitted]
        espo = config_from_args(EspoConfig, args)
    args.espo_kl_coef = check_objective(espo).kl_coef
    espo = config_from_args(EspoConfig, args)
    _check_blocks(args, espo)
    load_advantage(espo.advantage)
    check_parts(espo)
    config_from_args(MonitorConfig, args).validate()
    if args.attention_dropout or args.hidden_dropout:
        raise UserError(
            "dropout would make the ratio of unchanged weights differ from 1; pass "
            "--attention-dropout 0 --hidden-dropout 0."
        )
    check_policy_arguments(args, espo.fp8_phases)
    settle_policy(args)
    if args.seq_length is None:
        raise UserError("--seq-length is missing: the most tokens of prompt and completion.")
    if args.seq_length <= rollout.completion_length:
        raise UserError(
            f"--seq-length {args.seq_length} leaves no room for a prompt before "
            f"--rollout-completion-length {rollout.completion_length}."
        )
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    dp = data_parallel_ranks(args)
    if espo.prompts_per_rollout % dp:
        raise UserError(
            f"--espo-prompts-per-rollout {espo.prompts_per_rollout} cannot be split over {dp} "
            f"data-parallel ranks; use a multiple of {dp}."
        )
    each = views_per_completion(espo)
    views = Views(espo.completions_per_rollout // dp, each, "completion")
    settle_micro_batches(args, views)
    args.espo_gradient = chosen_gradient(espo, args.micro_batch_size)
    check_gradient_mode(args, args.espo_gradient, views, "--espo-gradient")
    # Megatron's schedules count samples: its global batch is the completions of one update.
    if args.global_batch_size not in (None, espo.completions_per_rollout):
        raise UserError(
            f"--global-batch-size {args.global_batch_size} follows from --espo-prompts-per-rollout "
            f"x --espo-group-size = {espo.completions_per_rollout}; leave it out."
        )
    args.global_batch_size = espo.completions_per_rollout
    args.espo_rows_per_batch, args.micro_batch_size = args.micro_batch_size, 1
    args.train_iters = espo.num_rollouts * espo.updates_per_rollout
    check_schedule(args)
    # Megatron's re-run machinery drives Megatron's own loop; without it a NaN gradient is an error.
    args.rerun_mode = "disabled"
    if args.async_save:
        raise UserError(
            "--async-save: a rollout's state and the policy are saved together; leave it out."
        )
    if espo.train_data is None:
        raise UserError("--espo-train-data is missing: the task's problems as JSONL.")
    if args.save_keep_best and espo.eval_data is None:
        raise UserError("--save-keep-best goes by --espo-eval-data, which is missing; pass it.")


def _check_blocks(args: argparse.Namespace, espo: EspoConfig) -> None:
    """Refuse what a model whose tokens come block by block cannot be trained with."""
    if args.block_growth_to is not None:
        raise UserError(
            f"--block-growth-to {args.block_growth_to}: blocks grow in pre-training and "
            "fine-tuning; ESPO's keep their size, leave it out."
        )
    if args.next_token_weight:
        raise UserError(
            f"--next-token-weight {args.next_token_weight} is a loss of pre-training and "
            "fine-tuning, which ESPO does not have; leave it out."
        )
    objective = objective_of(espo)
    by_block = objective.masks(espo).by_block
    # Of tokens, the block ELBO's views weigh each by its block.
    by_block = by_block and (objective.each_token_once or not objective.per_token)
    if block_length(args) is not None and not by_block:
        raise UserError(
            f"--espo-objective {espo.objective} is not defined for a model whose tokens come block "
            f"by block (--attention-mask {args.attention_mask}); use one of whole ELBOs, as espo."
        )


def _settle_mixing(args: argparse.Namespace) -> None:
    """Choose how often the reference is mixed where the command line does not say."""
    if args.lora_rank is None:
        if args.espo_reference_mix_interval is None:
            args.espo_reference_mix_interval = REFERENCE_MIX_INTERVAL
    elif args.espo_reference_mix_interval:
        raise UserError(
            f"--espo-reference-mix-interval {args.espo_reference_mix_interval}: with --lora-rank "
            "the reference is the base, and a mix of it with the policy would be adapters of "
            "another rank; leave it out or use 0."
        )
    else:
        args.espo_reference_mix_interval = 0


def main(argv: Sequence[str]) -> None:
    """Run ESPO from the command line.

    Args:
        argv: flags.
    """
    entry.start(argv, "megatron_espo.training.espo", prepare_arguments, run)


def run(args: argparse.Namespace) -> None:
    """Read and check what the run needs, and train.

    Args:
        args: Megatron's arguments, checked.
    """
    espo = config_from_args(EspoConfig, args)
    task = load_workers(espo)
    tokenizer = load_tokenizer(args.tokenizer_model)
    train_data = load_task_data(task, espo.train_data, tokenizer, args, training=True)
    eval_data = load_task_data(task, espo.eval_data, tokenizer, args, espo.eval_samples)
    assert train_data is not None
    made_with = settings_of(espo, args.seed, tokenizer)
    made_with |= {"--block-size": block_length(args) or 0}
    with own_save_folder(args):
        saved = None
        # Only now is the checkpoint the last one of a run that was still ending.
        if step := resumed_iteration(args):
            saved, source = read_state(args.load, step), f"--load {args.load}"
            check_provenance(saved, step, source, espo, args.seed, made_with, train_data)
        _train(args, task, tokenizer, train_data, eval_data, made_with, saved)


def _train(
    args: argparse.Namespace,
    task: Task,
    tokenizer: FastTokenizer,
    train_data: TaskData,
    eval_data: TaskData | None,
    made_with: Settings,
    saved: Mapping[str, Any] | None,
) -> None:
    """Build everything, with all ranks together from here on, and run ESPO."""
    espo, rollout = config_from_args(EspoConfig, args), config_from_args(RolloutConfig, args)
    parts = build_parts(args)
    reference = reference_policy(parts.chunks) if espo.kl_coef > 0.0 else None
    start, checkpoints = open_checkpoints(args, parts, reference, made_with, saved)
    held_out = eval_data.encoded if eval_data else ()
    model = diffusion_model(parts.chunks, [*train_data.encoded, *held_out])
    if model.layout.is_reporter:
        say(
            f"Gradients: {espo.gradient}, in micro-batches of {args.espo_rows_per_batch} views "
            f"({views_per_completion(espo)} of a completion); objective {espo.objective}"
        )
        if line := start_line(task):
            say(line)
    stop = StopRequest(model.layout)
    train(
        Trainer(
            model=model,
            reference=reference,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            tokenizer=tokenizer,
            task=task,
            train_data=train_data,
            eval_data=eval_data,
            espo=espo,
            rollout=rollout,
            seed=args.seed,
            rows_per_batch=args.espo_rows_per_batch,
            dashboard=open_dashboard(args, model.layout.is_reporter, start.watch),
            check_gradient=parts.check_gradient,
            inference=parts.inference,
            is_due=checkpoints.is_due,
            save=checkpoints.save,
            evaluated=checkpoints.evaluated,
            should_stop=stop.agreed,
            interrupted=stop.interrupted,
        ),
        start,
    )
    if isinstance(task, RewardWorkers):
        task.close()
    close_reports()


if __name__ == "__main__":
    run_entry_point(main)
