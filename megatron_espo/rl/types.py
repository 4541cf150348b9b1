"""The records that pass from prompt to gradient. Each hop makes a new one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron_espo.passes.batch import Sequences
from megatron_espo.tasks.base import Example, Score


@dataclass(frozen=True)
class Prompt:
    """A problem and its prompt (made by rl.rollout from a task's examples).

    Attributes:
        group_id: global number of the prompt in the run; its G completions share it.
        token_ids: the prompt.
        example: the problem, for the reward.
    """

    group_id: int
    token_ids: tuple[int, ...]
    example: Example


class Refill(NamedTuple):
    """A prompt in the place of another one.

    Attributes:
        place: of the prompt that is replaced, among all prompts of the rollout.
        number: of the further prompt, see `rl.prompts.further_prompts`.
    """

    place: int
    number: int


@dataclass(frozen=True)
class Discarded:
    """Completions that are not learnt from: their group, all of one reward, was replaced.

    g groups of G completions, on the data-parallel rank of the place in question. The attributes
    but the first are those of a Rollout.

    Attributes:
        places: int64 ``[g]``, among all prompts of the rollout.
        scores: g G scores.
        completion_lengths: int64 ``[g G]``.
        num_evaluations: int64 ``[g G]``.
        num_committed: int64 ``[g G]``.
        mean_confidence: float32 ``[g G]``.
        work: float64 ``[g G, 4]``.
    """

    places: Tensor
    scores: Sequence[Score]
    completion_lengths: Tensor
    num_evaluations: Tensor
    num_committed: Tensor
    mean_confidence: Tensor
    work: Tensor


@dataclass(frozen=True)
class SampledRollout:
    """Completions of this data-parallel rank (made by rl.rollout), whether scored or not yet.

    n completions, group by group.

    Attributes:
        sequences: prompts and completions, n rows.
        sample_ids: int64 ``[n]``, global ids, the keys of their noise.
        indices: int64 ``[n]``, places in the global batch of the rollout.
        completion_lengths: int64 ``[n]``, tokens before the end of sequence.
        num_evaluations: int64 ``[n]``, model evaluations (NFE).
        num_committed: int64 ``[n]``, tokens that the model decided.
        mean_confidence: float32 ``[n]``, their mean probability when they were committed.
        work: float64 ``[n, 4]``, see generation.sampler.Generation.
        commit_steps: int32 ``[n, l]``, the step map, likewise; ``[n, 0]`` without one.
    """

    sequences: Sequences
    sample_ids: Tensor
    indices: Tensor
    completion_lengths: Tensor
    num_evaluations: Tensor
    num_committed: Tensor
    mean_confidence: Tensor
    work: Tensor
    commit_steps: Tensor


@dataclass(frozen=True)
class Rollout(SampledRollout):
    """Scored completions of this data-parallel rank (made by rl.rollout, used by rl.trainer).

    Attributes:
        scores: n scores.
        rewards: float64 ``[n]``.
        advantages: float32 ``[n]``.
        token_advantages: float32 ``[n, l]``, for objectives that split advantages over tokens; None
            for others (rl.credit).
        texts: n completions as text, up to the end of sequence.
        refills: the further prompts among those of all ranks.
        discarded: the completions of this rank that they replaced; None without --espo-refill.
    """

    scores: Sequence[Score]
    rewards: Tensor
    advantages: Tensor
    texts: Sequence[str]
    refills: tuple[Refill, ...] = ()
    discarded: Discarded | None = None
    token_advantages: Tensor | None = None


class Sampling(NamedTuple):
    """A rollout whose scores may still be on their way.

    Attributes:
        rollout: its completions.
        score: waits for the scores; on all ranks together, once.
    """

    rollout: SampledRollout
    score: Callable[[], Rollout]


@dataclass(frozen=True)
class PreparedRollout:
    """A rollout with what the frozen policies say of it, ready for its optimizer steps.

    Made by rl.trainer; what a checkpoint inside a rollout holds (rl.resume).

    Attributes:
        rollout: scored completions of this rank.
        elbo_old: per update float32 ``[n, m]``, ELBO draws of the sampling policy under the
            update's masks, or ``[n, m, v, l]``, its log-probabilities of tokens, as the objective
            takes them; None for the first update until it is made, since its current policy is the
            sampling policy, and for all where the objective does not compare with them.
        elbo_ref: likewise of the reference policy, or None without a penalty.
    """

    rollout: Rollout
    elbo_old: tuple[Tensor | None, ...]
    elbo_ref: tuple[Tensor | None, ...]
