"""Preference optimization: ``torchrun -m megatron_espo.training.dpo [Megatron flags] [--dpo-*]``.

DPO on pairs of completions that are there, with VRPO's ELBO estimates (arXiv 2505.19223).
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from megatron_espo.checkpoint.tracker import resumed_iteration
from megatron_espo.config import DpoConfig, MonitorConfig
from megatron_espo.console import say
from megatron_espo.data.pairs import PairRows
from megatron_espo.data.tokenizer import load_tokenizer, vocabulary_digest
from megatron_espo.errors import UserError
from megatron_espo.model.fp8 import check_policy_arguments
from megatron_espo.preference.report import CHARTS
from megatron_espo.preference.rows import pairs_of, widths_of
from megatron_espo.preference.trainer import PreferenceTrainer, train
from megatron_espo.rl.provenance import Settings
from megatron_espo.rl.reference import reference_policy
from megatron_espo.rl.state import DPO, StopRequest, read_state
from megatron_espo.startup.argument_checks import check_schedule
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.startup.save_folder import own_save_folder
from megatron_espo.startup.setup import diffusion_model, run_entry_point
from megatron_espo.supervised.rows import epoch_steps, is_readable
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
    """Check the settings and derive Megatron's batch arithmetic from them.

    Args:
        args: parsed arguments; batch sizes and step counts are filled in.

    Raises:
        UserError: naming the flag.
    """
    dpo = config_from_args(DpoConfig, args)
    dpo.validate()
    config_from_args(MonitorConfig, args).validate()
    _refuse_what_has_no_part(args, dpo)
    check_policy_arguments(args, "both")
    if args.seq_length is None:
        raise UserError("--seq-length is missing: the most tokens of prompt and completion.")
    if dpo.completion_length is not None and dpo.completion_length > args.seq_length:
        raise UserError(
            f"--dpo-completion-length {dpo.completion_length} exceeds --seq-length "
            f"{args.seq_length}; change one of them."
        )
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.global_batch_size is None:
        raise UserError("--global-batch-size is missing: the pairs of an optimizer step.")
    _settle_batches(args, dpo)
    _settle_steps(args, dpo)
    check_schedule(args)
    # Megatron's re-run machinery drives Megatron's own loop; without it a NaN gradient is an error.
    args.rerun_mode = "disabled"
    if args.eval_interval is None:
        args.eval_interval = args.train_iters


def _refuse_what_has_no_part(args: argparse.Namespace, dpo: DpoConfig) -> None:
    """Refuse what preference optimization was not written for."""
    if dpo.train_data is None:
        raise UserError("--dpo-train-data is missing: prompts with two completions as JSONL.")
    if args.attention_dropout or args.hidden_dropout:
        raise UserError(
            "dropout would tell the policy from a reference of the same weights; pass "
            "--attention-dropout 0 --hidden-dropout 0."
        )
    if args.num_experts:
        raise UserError(
            f"--num-experts {args.num_experts}: preference optimization of mixtures of experts was "
            "not written; use fine-tuning or ESPO."
        )
    if args.block_growth_to is not None or args.next_token_weight:
        raise UserError(
            "--block-growth-to and --next-token-weight are of pre-training and fine-tuning; leave "
            "them out."
        )
    if args.async_save:
        raise UserError(
            "--async-save: the policy and its reference are saved together; leave it out."
        )
    if args.rampup_batch_size or args.step_batch_size_schedule is not None or args.train_samples:
        raise UserError(
            "--rampup-batch-size, --step-batch-size-schedule and --train-samples: preference "
            "optimization has steps of one size; use --train-iters or --dpo-epochs."
        )
    if args.save_keep_best and dpo.eval_data is None:
        raise UserError("--save-keep-best goes by --dpo-eval-data, which is missing; pass it.")
    if args.simulate:
        raise UserError(
            "--simulate: preference optimization can be planned (--dry-run), not simulated; leave "
            "it out."
        )


def _settle_batches(args: argparse.Namespace, dpo: DpoConfig) -> None:
    """Cut a step into micro-batches of views, and choose the way to the gradient."""
    dp = data_parallel_ranks(args)
    if args.global_batch_size % dp:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} pairs cannot be split over {dp} "
            f"data-parallel ranks; use a multiple of {dp}."
        )
    views = Views(args.global_batch_size // dp, 2 * dpo.views_per_completion, "pair")
    settle_micro_batches(args, views)
    if dpo.gradient == "auto":
        whole = args.micro_batch_size % views.each == 0
        args.dpo_gradient = "joint" if whole else "two_pass"
    check_gradient_mode(args, args.dpo_gradient, views, "--dpo-gradient")
    # Megatron's schedules count samples, which are pairs.
    args.dpo_rows_per_batch, args.micro_batch_size = args.micro_batch_size, 1


def _settle_steps(args: argparse.Namespace, dpo: DpoConfig) -> None:
    """Set the number of steps from --dpo-epochs; a plan does without the data."""
    if not dpo.epochs:
        if not args.train_iters:
            raise UserError("--train-iters is missing: how many steps to train; or --dpo-epochs.")
        return
    pairs = (
        len(pairs_of(args, args.dpo_train_data)) if is_readable(args, args.dpo_train_data) else None
    )
    batch = args.global_batch_size
    args.train_iters = epoch_steps(args, pairs or batch, batch, "--dpo-epochs")
    if pairs is not None and int(os.environ.get("RANK", "0")) == 0:
        say(
            f"{dpo.epochs:g} epochs of {pairs:,} pairs: {args.train_iters:,} steps of {batch} "
            "pairs."
        )


def main(argv: Sequence[str]) -> None:
    """Run preference optimization from the command line.

    Args:
        argv: flags.
    """
    entry.start(argv, "megatron_espo.training.dpo", prepare_arguments, run)


def run(args: argparse.Namespace) -> None:
    """Read and check what the run needs, and train.

    Args:
        args: Megatron's arguments, checked.
    """
    train_data = pairs_of(args, args.dpo_train_data)
    held_out = None if args.dpo_eval_data is None else pairs_of(args, args.dpo_eval_data)
    for rows in (train_data, held_out):
        if rows is not None and rows.num_skipped and args.rank == 0:
            say(f"{rows.path}: {rows.num_skipped} pairs that do not fit are left out.")
    made_with: Settings = {
        "--global-batch-size": args.global_batch_size,
        "--seed": args.seed,
        "--tokenizer-model": vocabulary_digest(load_tokenizer(args.tokenizer_model)),
    }
    with own_save_folder(args):
        saved = None
        # Only now is the checkpoint the last one of a run that was still ending.
        if step := resumed_iteration(args):
            saved = read_state(args.load, step, DPO)
            _check_continued(args, saved["made_with"], made_with)
        _train(args, train_data, held_out, made_with, saved)


def _check_continued(args: argparse.Namespace, theirs: Settings, ours: Settings) -> None:
    """Refuse to go on where a step would no longer stand for the same pairs, or tokens."""
    for flag, value in theirs.items():
        if ours[flag] != value:
            what = f"{value}, here it is {ours[flag]}"
            what = "another vocabulary" if flag == "--tokenizer-model" else what
            raise UserError(
                f"--load {args.load}: the run was saved with {flag} {what}; keep the run's value, "
                "or pass that folder with --pretrained-checkpoint and another one with --load and "
                "--save."
            )


def _train(
    args: argparse.Namespace,
    train_data: PairRows,
    held_out: PairRows | None,
    made_with: Settings,
    saved: dict[str, object] | None,
) -> None:
    """Build everything, with all ranks together from here on, and train."""
    dpo, parts = config_from_args(DpoConfig, args), build_parts(args)
    reference = reference_policy(parts.chunks)
    start, checkpoints = open_checkpoints(args, parts, reference, made_with, saved, DPO, CHARTS)
    files = [rows for rows in (train_data, held_out) if rows is not None]
    model = replace(diffusion_model(parts.chunks), widths=widths_of(args, files))
    mode: Literal["joint", "two_pass"] = "joint" if dpo.gradient == "joint" else "two_pass"
    if model.layout.is_reporter:
        say(
            f"Gradients: {mode}, in micro-batches of {args.dpo_rows_per_batch} views "
            f"({2 * dpo.views_per_completion} of a pair); {len(train_data):,} pairs"
        )
    train(
        PreferenceTrainer(
            model=model,
            reference=reference,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            train_data=train_data,
            held_out=held_out,
            dpo=dpo,
            mode=mode,
            batch_size=args.global_batch_size,
            num_steps=args.train_iters,
            eval_interval=args.eval_interval,
            log_interval=args.log_interval,
            seed=args.seed,
            rows_per_batch=args.dpo_rows_per_batch,
            dashboard=open_dashboard(args, model.layout.is_reporter, start.watch),
            check_gradient=parts.check_gradient,
            inference=parts.inference,
            is_due=checkpoints.is_due,
            save=checkpoints.save,
            evaluated=checkpoints.evaluated,
            should_stop=StopRequest(model.layout).agreed,
        ),
        start,
    )
    close_reports()


if __name__ == "__main__":
    run_entry_point(main)
