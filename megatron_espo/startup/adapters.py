"""Which adapters a run has, and on which base: checks before anything starts."""

import argparse
import os
from collections.abc import Sequence
from typing import NamedTuple

from megatron_espo.adapters.base import lora_settings
from megatron_espo.adapters.projections import HEAD, targets_of
from megatron_espo.checkpoint.tracker import checkpoint_folder, has_checkpoint
from megatron_espo.checkpoint.weights_mark import fingerprint
from megatron_espo.errors import UserError

SETTINGS = ("lora_rank", "lora_alpha", "lora_targets", "lora_rslora")
"""The arguments that say what the adapters are; a checkpoint of them decides."""


def check_adapters(args: argparse.Namespace) -> None:
    """Check the adapters' settings against each other and against the model and the layout.

    Args:
        args: parsed arguments.

    Raises:
        UserError: naming the flag to change.
    """
    lora = lora_settings(args)
    lora.validate()
    if lora.rank is None:
        return
    targets = targets_of(lora.targets, gated=bool(args.swiglu or args.quick_geglu))
    if HEAD in targets and not args.untie_embeddings_and_output_weights:
        raise UserError(
            f"--lora-targets {HEAD}: this model's head is its embedding, which would change with "
            "it; leave it out."
        )
    if targets == (HEAD,) and args.pipeline_model_parallel_size > 1:
        raise UserError(
            f"--lora-targets {HEAD}: only the last pipeline stage would have anything to train; "
            "add others or use --pipeline-model-parallel-size 1."
        )
    if args.fp8_param_gather:
        raise UserError(
            "--fp8-param-gather keeps trained weights in FP8, and those under --lora-rank are not "
            "trained; leave it out."
        )
    if args.fp8 and args.fp8_recipe == "delayed":
        raise UserError(
            "--fp8-recipe delayed carries scales of the base from step to step, which checkpoints "
            "of adapters do not hold; use tensorwise."
        )


class Stored(NamedTuple):
    """A checkpoint that a run is told of.

    Attributes:
        flag: that names the checkpoint, for messages.
        path: its value.
        args: the arguments stored in it.
    """

    flag: str
    path: str
    args: argparse.Namespace


def check_stored_adapters(args: argparse.Namespace, stored: Stored) -> None:
    """Compare the adapters with those of a checkpoint that the run would load.

    Args:
        args: the run's arguments.
        stored: the checkpoint.

    Raises:
        UserError: the checkpoint holds something else; saying what to do.
    """
    ours, theirs, where = lora_settings(args), lora_settings(stored.args), " ".join(stored[:2])
    if theirs.rank is None:
        if ours.rank is not None and stored.flag == "--load":
            raise UserError(
                f"{where} holds a whole model; to train adapters on it pass it with "
                "--pretrained-checkpoint, and another folder with --load and --save."
            )
        return
    if ours.rank is None:
        raise UserError(
            f"{where} holds LoRA adapters of rank {theirs.rank}; pass --lora-rank {theirs.rank} "
            "and what else they were trained with, or --use-checkpoint-args; to train all weights "
            "merge them into their base first (tools/convert_hf.py)."
        )
    gated = bool(args.swiglu or args.quick_geglu)
    for name, mine, other in (
        ("rank", ours.rank, theirs.rank),
        ("targets", targets_of(ours.targets, gated), targets_of(theirs.targets, gated)),
        ("scale (--lora-alpha, --lora-rslora)", ours.scale, theirs.scale),
    ):
        if mine != other:
            raise UserError(
                f"{where} holds other adapters: their {name} is {_text(other)} there and "
                f"{_text(mine)} here; keep the checkpoint's, or start anew in another folder."
            )


def _text(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def settle_base(args: argparse.Namespace, stored: Sequence[Stored]) -> None:
    """Find the base of a run with adapters, and see that it is the one they were trained on.

    Megatron does not get to see --pretrained-checkpoint: to it that is a whole model to start from.

    Args:
        args: the run's arguments; gets ``lora_base`` (a folder), ``lora_base_mark`` (which of its
            checkpoints) and ``lora_base_fingerprint``, which are saved with the adapters, and
            ``lora_start``, the adapters to start from, or None.
        stored: the checkpoints in --load and --pretrained-checkpoint, in this order, those that are
            there.

    Raises:
        UserError: there is no base, or another one.
    """
    if args.lora_rank is None:
        return
    owners = [s for s in stored if lora_settings(s.args).rank is not None]
    owner = owners[0] if owners else None
    whole = [s.path for s in stored if s not in owners]
    root = args.lora_base or (whole[0] if whole else owner and owner.args.lora_base)
    if root is None:
        raise UserError(
            "--lora-rank trains adapters of a base; pass its checkpoint with "
            "--pretrained-checkpoint."
        )
    if not has_checkpoint(root):
        found = (
            f"{' '.join(owner[:2])} holds adapters of {root}" if owner else f"--lora-base {root}"
        )
        raise UserError(
            f"{found}: no checkpoint is there; pass --lora-base with the place it has now."
        )
    mark = owner and owner.args.lora_base_mark
    if mark is None or not os.path.isdir(os.path.join(root, mark)):
        mark = os.path.basename(checkpoint_folder(root))
    ours = fingerprint(os.path.join(root, mark))
    for other in owners:
        if ours != other.args.lora_base_fingerprint:
            theirs = os.path.join(other.args.lora_base, other.args.lora_base_mark)
            raise UserError(
                f"{os.path.join(root, mark)} is not what the adapters in {' '.join(other[:2])} "
                f"were trained on (that was {theirs}, with other weights); pass --lora-base with "
                "that one."
            )
    args.lora_base, args.lora_base_mark = os.path.abspath(root), mark
    args.lora_base_fingerprint, args.lora_start = ours, None
    if owner is not None and owner.flag != "--load":
        args.lora_start = checkpoint_folder(owner.path)
    args.pretrained_checkpoint = None
    args.perform_initialization = False  # the base's weights come from its checkpoint
