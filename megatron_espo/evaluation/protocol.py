"""What an evaluation does at each completion length: documented flags, checked together."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_espo.config import RolloutConfig
from megatron_espo.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """An evaluation as asked for.

    Attributes:
        configs: sampling settings by completion length.
        num_samples: completions per problem.
        ks: which pass@k to estimate.
    """

    configs: dict[int, RolloutConfig]
    num_samples: int
    ks: tuple[int, ...]


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an evaluation."""
    parser.add_argument(
        "--eval-lengths",
        type=int,
        nargs="+",
        help="completion lengths, each with the published protocol: blocks of "
        "--rollout-block-length (32), one model evaluation per --eval-tokens-per-step; without "
        "it the --rollout-* flags are taken as they are",
    )
    parser.add_argument(
        "--eval-tokens-per-step",
        type=int,
        default=2,
        help="with --eval-lengths: tokens per denoising step, steps = length / this (default 2)",
    )
    parser.add_argument(
        "--eval-temperature", type=float, default=0.0, help="0 (default): greedy, 1 sample"
    )
    parser.add_argument(
        "--eval-num-samples", type=int, default=1, help="completions per problem (default 1)"
    )
    parser.add_argument(
        "--eval-pass-at-k",
        type=int,
        nargs="+",
        help="with several samples: which pass@k to estimate (default: 1 and all samples)",
    )


def read_protocol(
    options: argparse.Namespace, rollout: RolloutConfig, given: Sequence[str] = ()
) -> Protocol:
    """Check the flags and settle each length's sampling settings.

    Args:
        options: values of :func:`add_protocol_arguments`.
        rollout: the ``--rollout-*`` settings.
        given: the command line, to refuse flags that would have no effect.

    Returns:
        The protocol; its settings are not validated against the model.

    Raises:
        UserError: naming the flag.
    """
    flags = {argument.split("=")[0] for argument in given}
    if "--rollout-temperature" in flags:
        raise UserError(
            "--rollout-temperature has no effect here: an evaluation is greedy unless "
            "--eval-temperature says otherwise."
        )
    for flag in ("--rollout-top-p", "--rollout-top-k"):
        if flag in flags and not options.eval_temperature > 0.0:
            raise UserError(
                f"{flag} has no effect on a greedy evaluation; set --eval-temperature above 0 or "
                "leave it out."
            )
    for flag in ("--rollout-completion-length", "--rollout-denoising-steps"):
        if options.eval_lengths is not None and flag in flags:
            raise UserError(f"{flag} follows from --eval-lengths; leave one of them out.")
    samples, temperature = options.eval_num_samples, options.eval_temperature
    if samples < 1:
        raise UserError(f"--eval-num-samples {samples} must be at least 1.")
    if samples > 1 and not temperature > 0.0:
        raise UserError(
            f"--eval-num-samples {samples}: greedy samples of a problem would all be the same; "
            "set --eval-temperature."
        )
    ks = options.eval_pass_at_k or ([1, samples] if samples > 1 else [])
    for k in ks:
        if not 1 <= k <= samples:
            raise UserError(
                f"--eval-pass-at-k {k} needs {k} samples per problem; raise --eval-num-samples "
                f"{samples}."
            )
    # A recipe's top-p is for its rollouts.
    rollout = replace(rollout, temperature=temperature) if temperature else rollout.greedy()
    if options.eval_lengths is None:
        configs = {rollout.completion_length: rollout}
    else:
        configs = {
            length: _published(rollout, length, options.eval_tokens_per_step)
            for length in options.eval_lengths
        }
    return Protocol(configs, samples, tuple(dict.fromkeys(ks)))


def _published(rollout: RolloutConfig, length: int, tokens_per_step: int) -> RolloutConfig:
    """The published protocol: greedy, blocks of 32, steps = length / 2."""
    if length < 1 or tokens_per_step < 1 or length % tokens_per_step:
        raise UserError(
            f"--eval-lengths {length} is not a multiple of --eval-tokens-per-step "
            f"{tokens_per_step}; change one of them."
        )
    return replace(
        rollout,
        completion_length=length,
        block_length=min(rollout.block_length, length),
        denoising_steps=length // tokens_per_step,
    )
