"""FP8 through Transformer Engine: what it needs, and where it is used.

Only the linear layers inside the transformer layers compute in FP8. Embedding, attention core,
norms, output head, log-probabilities and the optimizer stay in their own precision.

Scaling recipes of Transformer Engine (``--fp8-recipe``):

* stateless: ``tensorwise`` (one scale per tensor, from its own largest entry), ``blockwise``
  (1 x 128 tiles of activations, 128 x 128 blocks of weights), ``mxfp8`` (groups of 32, Blackwell).
  The result of a pass is a function of its weights and its inputs.
* ``delayed``: scales come from the largest entries of earlier passes. Two passes of the same
  weights over the same inputs then differ, and checkpoints hold the scales as pickles.
"""

import argparse
import contextlib
import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from megatron_espo.errors import UserError

Phases = Literal["both", "rollout", "elbo"]
Phase = Literal["rollout", "elbo"]

STATELESS_RECIPES = ("tensorwise", "blockwise", "mxfp8")
DEFAULT_RECIPE = "tensorwise"

# Transformer Engine's own switch: 1 lets it open the pickles of delayed scaling in a checkpoint.
# Whoever wrote a pickle decides what runs when it is opened, so nothing here sets it.
OPEN_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"

# Transformer Engine's matrix products take dimensions in multiples of this; mxfp8 refuses tensors
# that do not split into groups of 32.
_ALIGNMENT = {"mxfp8": 32}
_USUAL_ALIGNMENT = 16
# Side of a blockwise tile: sequence-parallel ranks gather activations in FP8 where their share of
# the tokens is a multiple of it, and in higher precision otherwise.
_BLOCK = 128


def alignment(recipe: str) -> int:
    """Return what every dimension of an FP8 matrix product must be a multiple of."""
    return _ALIGNMENT.get(recipe, _USUAL_ALIGNMENT)


def sequence_multiple(recipe: str | None, split: int, rows: int = 1) -> int:
    """Say to what multiple of positions rows must be padded.

    The tokens of a product are rows x positions; with sequence parallelism each rank quantizes its
    share of the positions. Weight gradients sum over the tokens: these must be aligned, too.

    Args:
        recipe: FP8 recipe, or None without FP8.
        split: ranks that share the positions of a row: the tensor-parallel size with sequence
            parallelism, else 1.
        rows: rows per micro-batch always come in multiples of this.

    Returns:
        The multiple. It does for any number of rows; ``rows`` only serves the blockwise recipe,
        whose tiles of 128 tokens then fill each rank's share.
    """
    if recipe is None:
        return split
    per_rank = alignment(recipe)
    if recipe == "blockwise" and split > 1:
        per_rank = max(per_rank, _BLOCK // math.gcd(_BLOCK, rows))
    return split * per_rank


def check_arguments(args: argparse.Namespace) -> None:
    """Check the FP8 flags of any run against each other and the model's shape.

    Args:
        args: Megatron's arguments after its own validation.

    Raises:
        UserError: naming the flag to change.
    """
    if not args.fp8:
        return
    if not args.bf16:
        raise UserError(f"--fp8-format {args.fp8}: what is not FP8 computes in bf16; add --bf16.")
    if args.fp8_recipe == "delayed" and (args.save or args.load) and not opens_pickles():
        raise UserError(
            "--fp8-recipe delayed keeps its scales in checkpoints as pickles, which Transformer "
            "Engine refuses to open, so that the run could not be resumed; use tensorwise or "
            f"blockwise, or set {OPEN_PICKLES}=1 if nobody else can write to --save."
        )
    needed = alignment(args.fp8_recipe)
    for flag, (size, parts) in _layer_dimensions(args).items():
        if size % (needed * parts):
            split = f" on {parts} tensor-parallel ranks" if parts > 1 else ""
            raise UserError(
                f"{flag} gives a layer dimension of {size}; --fp8-recipe {args.fp8_recipe} needs "
                f"a multiple of {needed * parts}{split}."
            )


def opens_pickles(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user lets Transformer Engine open the pickles of delayed scaling."""
    return environment.get(OPEN_PICKLES) == "1"


def check_stored(stored: argparse.Namespace, transformer_impl: str, source: str) -> None:
    """Check that Transformer Engine will read a checkpoint.

    Args:
        stored: the checkpoint's arguments.
        transformer_impl: --transformer-impl of the run that loads it.
        source: flag and folder.

    Raises:
        UserError: it was trained with delayed scaling.
    """
    delayed = getattr(stored, "fp8", None) and getattr(stored, "fp8_recipe", None) == "delayed"
    if delayed and transformer_impl == "transformer_engine" and not opens_pickles():
        raise UserError(
            f"{source} was trained with --fp8-recipe delayed and holds pickles, which Transformer "
            f"Engine refuses to open; set {OPEN_PICKLES}=1 if you trust who wrote it, or use "
            "--transformer-impl local."
        )


def _layer_dimensions(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """The dimensions of the layers' matrices, and among how many ranks each is split."""
    tp = args.tensor_model_parallel_size
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    heads = args.num_attention_heads * args.kv_channels
    return {
        "--hidden-size": (args.hidden_size, 1),
        "--num-attention-heads x --kv-channels": (heads, tp),
        "--num-query-groups x --kv-channels": (heads + 2 * groups * args.kv_channels, tp),
        "--ffn-hidden-size": (args.ffn_hidden_size, tp),
    }


def check_policy_arguments(args: argparse.Namespace, phases: Phases) -> None:
    """Check that old, current and reference ELBOs of the same weights would agree.

    Args:
        args: parsed arguments.
        phases: --espo-fp8-phases.

    Raises:
        UserError: naming the flag to change.
    """
    if not args.fp8:
        if phases != "both":
            raise UserError(f"--espo-fp8-phases {phases} needs --fp8-format; leave one out.")
        return
    if args.fp8_recipe not in STATELESS_RECIPES:
        raise UserError(
            f"--fp8-recipe {args.fp8_recipe} carries scales from call to call, so that ratios of "
            f"unchanged weights would differ from 1; use one of {', '.join(STATELESS_RECIPES)}."
        )
    if args.fp8_param_gather:
        raise UserError(
            "--fp8-param-gather keeps the weights in FP8, and mixing or swapping the reference "
            "policy would round them; leave it out."
        )


def check_device(recipe: str) -> None:
    """Check that this GPU and its libraries can run a recipe.

    Args:
        recipe: FP8 recipe.

    Raises:
        UserError: with Transformer Engine's own reason.
    """
    manager = _quantization().FP8GlobalStateManager
    ask = {
        "mxfp8": manager.is_mxfp8_available,
        "blockwise": manager.is_fp8_block_scaling_available,
    }.get(recipe, manager.is_fp8_available)
    available, reason = ask()
    if not available:
        raise UserError(f"--fp8-recipe {recipe} does not run on this GPU: {reason}")


def _quantization() -> Any:
    try:
        return importlib.import_module("transformer_engine.pytorch.quantization")
    except ModuleNotFoundError:
        # Its name in older versions; in newer ones a deprecated one.
        return importlib.import_module("transformer_engine.pytorch.fp8")


@contextlib.contextmanager
def fp8_phase(chunks: Sequence[torch.nn.Module], phase: Phase, phases: Phases) -> Iterator[None]:
    """Compute in FP8 inside the context only if the phase is one of those that do.

    Megatron's transformer block reads ``config.fp8`` at every forward pass. Backward passes belong
    inside the context, too: recomputed layers read it again.

    Args:
        chunks: this rank's model chunks.
        phase: what is about to run: a rollout, or ELBOs and updates.
        phases: --espo-fp8-phases.
    """
    # Mostly one object; attention copies it where it changes a setting.
    configs: dict[int, Any] = {
        id(module.config): module.config
        for chunk in chunks
        for module in chunk.modules()
        if getattr(getattr(module, "config", None), "fp8", None)
    }
    if phases in ("both", phase) or not configs:
        yield
        return
    formats = {key: config.fp8 for key, config in configs.items()}
    for config in configs.values():
        config.fp8 = None
    try:
        yield
    finally:
        for key, config in configs.items():
            config.fp8 = formats[key]
