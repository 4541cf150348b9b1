"""What a run was saved with, and what of it must stay when the run goes on.

Masks and tokens are functions of the seed, of counts and of the prompts. Completions, old ELBOs and
masks of a rollout in hand belong together only while none of these changes; between two rollouts
most of them may.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_espo.config import EspoConfig
from megatron_espo.data.tokenizer import FastTokenizer, vocabulary_digest
from megatron_espo.errors import UserError
from megatron_espo.evaluation.problems import TaskData
from megatron_espo.rl.prompts import prompts_of_rollout
from megatron_espo.rl.types import Prompt, Refill

Settings = dict[str, int | str]
"""Values by flag."""

# What may not change at all: it says which rollout a step belongs to, and what tokens mean.
_OF_THE_RUN = ("--espo-updates-per-rollout", "--tokenizer-model")


def settings_of(espo: EspoConfig, seed: int, tokenizer: FastTokenizer) -> Settings:
    """List what a rollout in hand is made with, besides its prompts.

    Args:
        espo: the run's settings.
        seed: the run's seed.
        tokenizer: the tokenizer.

    Returns:
        Values by flag; the tokenizer's is a digest of its vocabulary.
    """
    return {
        "--espo-updates-per-rollout": espo.updates_per_rollout,
        "--tokenizer-model": vocabulary_digest(tokenizer),
        "--seed": seed,
        "--espo-task": espo.task,
        "--espo-prompts-per-rollout": espo.prompts_per_rollout,
        "--espo-group-size": espo.group_size,
        "--espo-num-mc": espo.num_mc,
        "--espo-elbo-estimator": espo.elbo_estimator,
        "--espo-kl-estimator": espo.kl_estimator,
        "--espo-objective": espo.objective,
        "--espo-objective-args": " ".join(espo.objective_args or ()) or "none",
    }


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Recognise the prompts of a rollout, over all ranks, by their places and token ids."""
    ids = [(prompt.group_id, prompt.token_ids) for prompt in prompts]
    return hashlib.sha256(repr(ids).encode()).hexdigest()


def check_provenance(
    state: Mapping[str, Any],
    step: int,
    source: str,
    espo: EspoConfig,
    seed: int,
    ours: Settings,
    data: TaskData,
) -> None:
    """Refuse to go on with a run whose rollout in hand does not belong to these settings.

    Args:
        state: what the checkpoint holds (rl.state).
        step: optimizer steps done.
        source: where it lies, for the message.
        espo: the run's settings.
        seed: the run's seed.
        ours: what :func:`settings_of` lists for this run.
        data: the problems to train on.

    Raises:
        UserError: naming the flag.
    """
    in_hand = state["rollout"]
    for flag, theirs in state.get("made_with", {}).items():
        if flag in _OF_THE_RUN:
            if theirs != ours[flag]:
                raise UserError(_refusal(source, flag, theirs, ours[flag]))
        elif in_hand is not None and _differ(flag, theirs, ours[flag]):
            number = step // espo.updates_per_rollout + 1
            raise UserError(
                f"{source}: step {step} lies inside rollout {number}, which was made with {flag} "
                f"{theirs}, here it is {ours[flag]}; keep the value until the rollout's last step, "
                f"{number * espo.updates_per_rollout}."
            )
    if in_hand is None:
        return
    number = step // espo.updates_per_rollout
    prompts = prompts_of_rollout(
        number,
        espo.prompts_per_rollout,
        data.examples,
        data.encoded,
        seed,
        data.shares,
        [Refill(*pair) for pair in in_hand.get("refills", ())],
    )
    if prompts_digest(prompts) != in_hand["prompts"]:
        raise UserError(
            f"{source}: step {step} lies inside rollout {number + 1}, which was made from other "
            "prompts; pass the --espo-train-data and the --tokenizer-model (its chat template, "
            f"too) that it was made with until its last step, "
            f"{(number + 1) * espo.updates_per_rollout}."
        )


def _differ(flag: str, theirs: int | str, ours: int | str) -> bool:
    if flag == "--espo-kl-estimator":
        # Of these only one decides how masks are drawn.
        return (theirs == "k2_unbiased") != (ours == "k2_unbiased")
    return theirs != ours


def _refusal(source: str, flag: str, theirs: int | str, ours: int | str) -> str:
    if flag == "--tokenizer-model":
        return (
            f"{source}: the run was saved with another vocabulary than that of --tokenizer-model; "
            "pass the tokenizer that it was trained with."
        )
    return (
        f"{source}: the run was saved with {flag} {theirs}, here it is {ours}; keep the run's "
        "value, or pass that folder with --pretrained-checkpoint and another one with --load and "
        "--save."
    )
