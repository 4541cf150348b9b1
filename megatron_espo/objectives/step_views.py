"""Views of the states that a completion went through while it was sampled.

The sampler's step map (generation.sampler.Generation) says which model evaluation committed each
token, so that every state can be made again: what was committed earlier is there, the rest masked.
Steps that committed nothing have no view, and neighbouring ones may share one, which is the state
before the first of them.

Symbols: b completions, v views per draw, l completion length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_espo.config import RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.objectives.just_grpo import MOST_PASSES, exact_passes
from megatron_espo.objectives.masks import Ask
from megatron_espo.objectives.ordered_views import OrderedViews


@dataclass(frozen=True)
class StepViews(OrderedViews):
    """One view for each step of a completion, or for some of them together.

    A view predicts the tokens that its steps committed, and masks them and all later ones. Of a
    model with blocks the steps of each block count by themselves, and a view holds one of every
    block: all blocks pass at once. Tokens that no step committed, because they were filled in after
    the end, are masked in every view and predicted in none. A completion with fewer steps than the
    run allows has views that predict nothing.

    Attributes:
        merged: neighbouring steps that share a view.
        by_block: whether a block-diffusion model has such views, too.
    """

    merged: int = 1
    by_block: bool = True
    # Together they predict a completion; with --rollout-threshold one view may have more of it.
    of_steps = True

    def number(self, ask: Ask) -> Tensor:
        """See OrderedViews."""
        assert ask.commit_steps is not None, "the sampler was not asked for step maps"
        blocks = torch.zeros(len(ask.sample_ids), ask.length, dtype=torch.int64)
        if ask.offsets is not None:
            blocks = (ask.offsets[:, None] + torch.arange(ask.length)) // ask.block_length
        step = number_steps(ask.commit_steps.long(), blocks)
        assert int(step.max()) // self.merged < self.passes, "--espo-objective-args passes"
        return torch.where(step < 0, self.passes, step // self.merged)


def number_steps(steps: Tensor, blocks: Tensor) -> Tensor:
    """Number those steps of each block that committed something, from 0.

    Args:
        steps: int64 ``[b, l]``, the step that committed each token, or -1.
        blocks: int64 ``[b, l]``, the block of each token.

    Returns:
        int64 ``[b, l]``, the number of each token's step in its block, or -1.
    """
    known, span = steps >= 0, int(steps.max()) + 2
    # Blocks one after the other; a block's -1 lies beyond all steps of the one before.
    keys, order = (blocks * span + steps).sort(dim=1)
    rank = (keys.diff(dim=1, prepend=keys[:, :1]) != 0).cumsum(dim=1)
    rank = torch.zeros_like(steps).scatter(1, order, rank)
    first = steps.new_full((len(steps), int(blocks.max()) + 1), steps.size(1))
    first = first.scatter_reduce(1, blocks, rank.where(known, steps.size(1)), "amin")
    return (rank - first.gather(1, blocks)).where(known, -1)


def step_passes(
    name: str, asked: int, merged: int, rollout: RolloutConfig, block_size: int | None
) -> tuple[str, ...]:
    """Settle the passes of an objective on step maps.

    Args:
        name: of the objective.
        asked: passes of --espo-objective-args, or 0.
        merged: neighbouring steps of a pass.
        rollout: how completions are sampled.
        block_size: tokens of a block of the model; None where all positions see each other.

    Returns:
        "passes=NEEDED": a pass for so many steps as a completion has at most, or a block of a model
        with blocks.

    Raises:
        UserError: another number was asked for, there are too many, or the step map would not tell
            the states.
    """
    if rollout.is_editing:
        raise UserError(
            f"--rollout-editing-threshold {rollout.editing_threshold} replaces tokens after the "
            f"step that committed them, so that the steps of --espo-objective {name} cannot be "
            "made again; leave it out."
        )
    steps = rollout.steps_per_block
    if block_size is None:
        steps *= rollout.completion_length // rollout.block_length
    passes = -(-steps // merged)
    if passes > MOST_PASSES:
        raise UserError(
            f"--espo-objective {name} passes a completion once for every {merged} of its denoising "
            f"steps: {steps} steps make {passes} passes, and {MOST_PASSES} are the most; use fewer "
            "--rollout-denoising-steps, or trace_rl with a larger merged= in "
            "--espo-objective-args."
        )
    return exact_passes(name, asked, passes)
