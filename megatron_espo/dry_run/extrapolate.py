"""From the steps, micro-batches and updates that were simulated to those of the whole run.

What a phase costs is a multiple of what was run: denoising steps of their kinds, micro-batches,
updates. What is done once an update (gradients and weights over the data-parallel ranks, the
optimizer) is counted by updates.
"""

from dataclasses import dataclass

from megatron_espo.dry_run.record import Phase, Rank
from megatron_espo.dry_run.roofline import Ceilings

# Groups that exchange gradients and weights, once an update.
_ONCE = ("dp", "dp-cp")


@dataclass(frozen=True)
class Cost:
    """Seconds of one part of a run on one GPU, from its ceilings.

    Attributes:
        kernels: kernels launched.
        flops: floating-point operations.
        device: the kernels, one after another.
        communication: the collectives, one after another.
    """

    kernels: float = 0.0
    flops: float = 0.0
    device: float = 0.0
    communication: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Add two costs."""
        return Cost(
            self.kernels + other.kernels,
            self.flops + other.flops,
            self.device + other.device,
            self.communication + other.communication,
        )

    def times(self, factor: float) -> "Cost":
        """Multiply a cost."""
        return Cost(
            self.kernels * factor,
            self.flops * factor,
            self.device * factor,
            self.communication * factor,
        )

    def seconds(self, ceilings: Ceilings) -> float:
        """Seconds where nothing overlaps, and no fewer than launching the kernels takes."""
        return max(self.device + self.communication, self.kernels * ceilings.launch)


def espo_costs(rank: Rank, updates: int, simulated_updates: int) -> dict[str, Cost]:
    """Costs of one rollout with its updates.

    Args:
        rank: the simulated rank.
        updates: per rollout.
        simulated_updates: of them.

    Returns:
        By phase.
    """
    facts, phases = rank.facts, rank.phases
    passes = facts["micro_batches"] / facts["simulated_micro_batches"]
    costs = {"rollout": rollout_cost(rank)}
    if "old_elbo" in phases and simulated_updates > 1:
        factor = passes * (updates - 1) / (simulated_updates - 1)
        costs["old_elbo"] = _cost(phases["old_elbo"]).times(factor)
    if "ref_elbo" in phases:
        costs["ref_elbo"] = _cost(phases["ref_elbo"]).times(passes * updates / simulated_updates)
    costs["update"] = update_cost(rank, passes, updates / simulated_updates)
    return costs


def update_cost(rank: Rank, passes: float, updates: float) -> Cost:
    """Cost of updates.

    Args:
        rank: the simulated rank.
        passes: how many times as many micro-batches an update has as were run.
        updates: how many times as many updates.
    """
    inside = rank.phases.get("update: passes", Phase())
    once = sum(s for label, s in inside.communication.items() if label in _ONCE)
    every = _cost(inside)
    every = Cost(every.kernels, every.flops, every.device, every.communication - once)
    optimizer = _cost(rank.phases.get("update", Phase()))
    return every.times(passes * updates) + (optimizer + Cost(communication=once)).times(updates)


def rollout_cost(rank: Rank) -> Cost:
    """Cost of a rollout: as many whole passes and windows as it has.

    Steps that commit more than one token by their confidence may be fewer: counted are those of
    the schedule.
    """
    facts, steps = rank.facts, rank.steps
    if not steps:
        return Cost()
    most = max(step["flops"] for step in steps)
    whole = [s for s in steps if s["flops"] > 0.5 * most]
    windows = [s for s in steps if s["flops"] <= 0.5 * most]
    waves = -(-facts["rollout_rows"] // facts["rollout_batch"])
    total = facts["denoising_steps"] * waves
    num_whole = total if not windows else min(facts["whole_passes"] * waves, total)
    return _mean(whole).times(num_whole) + _mean(windows).times(total - num_whole)


def _mean(steps: list[dict[str, float]]) -> Cost:
    if not steps:
        return Cost()
    n = len(steps)
    return Cost(
        sum(s["kernels"] for s in steps) / n,
        sum(s["flops"] for s in steps) / n,
        sum(s["seconds"] for s in steps) / n,
        sum(s["communication"] for s in steps) / n,
    )


def _cost(phase: Phase) -> Cost:
    spent = sum(phase.communication.values())
    return Cost(phase.kernels, phase.flops, phase.seconds, spent)
