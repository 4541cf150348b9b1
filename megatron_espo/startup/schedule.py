"""The learning-rate schedule of a run that goes on: the saved one, or a new one if asked for.

Megatron compares the two as well, in samples and without naming a flag. Here steps count, so that
another batch changes nothing, and what has no effect is not compared.
"""

import argparse

from megatron_espo.errors import UserError
from megatron_espo.megatron_patches import rescale_schedule

# What --use-checkpoint-opt-param-scheduler takes from the checkpoint.
_SAVED = (
    "lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "lr_decay_style", "lr_decay_iters",
    "lr_decay_samples", "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
    "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_warmup_init",
    "start_weight_decay", "end_weight_decay", "weight_decay_incr_style",
)  # fmt: skip
_NEW, _OLD = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


def settle_schedule(args: argparse.Namespace, stored: argparse.Namespace, source: str) -> None:
    """Decide which schedule holds for a run that loads its optimizer's state.

    Args:
        args: Megatron's arguments, validated; changed so that Megatron takes what was decided.
        stored: the checkpoint's.
        source: where the checkpoint lies, for the message.

    Raises:
        UserError: the schedule was changed and no flag says which one is meant.
    """
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise UserError(f"{_NEW} and {_OLD} exclude each other; pass one of them.")
    if args.use_checkpoint_opt_param_scheduler:
        for name in _SAVED:
            setattr(args, name, getattr(stored, name, None))
    elif not args.override_opt_param_scheduler:
        _compare(args, stored, source)
    args.override_opt_param_scheduler, args.use_checkpoint_opt_param_scheduler = True, False
    # Megatron's schedule counts samples. A step of the run has another number of them now.
    if args.train_iters and not args.rampup_batch_size:
        rescale_schedule(stored.global_batch_size, args.global_batch_size)


def _compare(args: argparse.Namespace, stored: argparse.Namespace, source: str) -> None:
    theirs, ours = schedule(stored), schedule(args)
    for flag in [*theirs, *ours]:
        if theirs.get(flag) != ours.get(flag):
            length = " (by default the run's length)" if flag.startswith("--lr-decay-it") else ""
            raise UserError(
                f"{source}: the run was saved with {flag} {theirs.get(flag)}, here it is "
                f"{ours.get(flag)}{length}; pass {_NEW} to go on with the new learning-rate "
                f"schedule, or {_OLD} with the saved one."
            )


def schedule(args: argparse.Namespace) -> dict[str, float | str | None]:
    """List what decides the learning rate and the weight decay of every step.

    Args:
        args: Megatron's arguments, validated.

    Returns:
        Values by flag; those without effect are left out.
    """
    unit = "iters" if args.train_iters else "samples"
    length = getattr(args, f"train_{unit}")
    decay = getattr(args, f"lr_decay_{unit}") or length
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    values = {
        "--lr": args.lr,
        "--lr-decay-style": args.lr_decay_style,
        f"--lr-warmup-{unit}": warmup,
        "--weight-decay": args.start_weight_decay,
        "--decoupled-lr": args.decoupled_lr,
    }
    if warmup:
        values["--lr-warmup-init"] = args.lr_warmup_init
    if args.lr_decay_style != "constant":
        values |= {
            "--min-lr": args.min_lr,
            "--decoupled-min-lr": args.decoupled_min_lr,
            f"--lr-decay-{unit}": decay,
        }
    if args.lr_decay_style == "WSD":
        values |= {
            f"--lr-wsd-decay-{unit}": getattr(args, f"lr_wsd_decay_{unit}"),
            "--lr-wsd-decay-style": args.lr_wsd_decay_style,
        }
    if args.weight_decay_incr_style != "constant":
        values |= {
            "--weight-decay-incr-style": args.weight_decay_incr_style,
            "--end-weight-decay": args.end_weight_decay,
            f"--train-{unit}": length,
        }
    return values
