"""What a simulation found, in words and tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_espo.dry_run.extrapolate import Cost
from megatron_espo.dry_run.job import Job
from megatron_espo.dry_run.record import Phase, Rank
from megatron_espo.dry_run.roofline import Ceilings

GB = 1e9
# Parts of the peak, waits and collectives that are listed.
_LISTED = 6


@dataclass(frozen=True)
class Estimate:
    """Seconds of a rollout with its updates, or of a step, from the ceilings.

    An estimate from below: nothing overlaps, and nothing waits.

    Attributes:
        seconds: by phase.
        costs: what they consist of.
        tokens_per_second: on all ranks.
        mfu: share of a GPU's peak.
    """

    seconds: Mapping[str, float]
    costs: Mapping[str, Cost]
    tokens_per_second: float
    mfu: float


def estimate(
    ceilings: Ceilings, costs: Mapping[str, Cost], tokens: float, peak_flops: float
) -> Estimate | None:
    """Estimate the time of a part of a run.

    Args:
        ceilings: of a GPU.
        costs: of this part on one GPU, by phase.
        tokens: that the job makes or trains on meanwhile, on all ranks.
        peak_flops: of a GPU, operations per second.

    Returns:
        The estimate; None without costs.
    """
    seconds = {name: cost.seconds(ceilings) for name, cost in costs.items()}
    total = sum(seconds.values())
    if total == 0.0:
        return None
    flops = sum(cost.flops for cost in costs.values())
    return Estimate(seconds, costs, tokens / total, flops / total / peak_flops)


def report(job: Job, rank: Rank, found: Estimate | None, planned: float | None) -> str:
    """Describe a rank that ran to its end.

    Args:
        job: what was asked for.
        rank: what it did.
        found: its time, or None.
        planned: peak by the plan's arithmetic, in bytes without its reserve, or None.

    Returns:
        Lines.
    """
    engine = rank.facts["transformer_engine"]
    layers = f"Transformer Engine {engine}'s Python layer" if engine else "plain layers"
    name, peak = rank.peak
    lines = [
        f"Simulated rank {rank.rank} of {job.world_size}: {rank.status} "
        f"({layers}; {rank.wall:.0f} s and {rank.host_memory / GB:.1f} GB of this machine)",
        f"  peak {peak / GB:.2f} GB ({name}); pinned host memory {rank.pinned / GB:.2f} GB",
    ]
    if planned is not None:
        lines.append(
            f"  the plan's arithmetic: {planned / GB:.2f} GB without its reserve, "
            f"{100 * (planned / peak - 1):+.1f}%"
        )
    for name, phase in rank.phases.items():
        if phase.kernels:
            lines += _phase(name, phase)
    if found is not None:
        lines += _seconds(job.ceilings, found)
    return "\n".join(lines)


def _phase(name: str, phase: Phase) -> Iterator[str]:
    units = "".join(f", {number} x {unit}" for unit, number in phase.units.items())
    yield (
        f"  {name}: peak {phase.peak / GB:.2f} GB; {phase.kernels:,} kernels, "
        f"{phase.flops:.2e} operations, {phase.num_waits} waits for the device{units}"
    )
    for part, size in list(phase.parts.items())[:_LISTED]:
        if size > 0.005 * phase.peak:
            yield f"    alive {size / GB:7.3f} GB made in {part}"
    largest = sorted(phase.collectives.items(), key=lambda entry: -entry[1][1])
    for kind, (number, size) in largest[:_LISTED]:
        what, group, ranks = kind.split("/")
        yield f"    {what} over {ranks} ranks ({group}): {number} x, {size / GB:.3f} GB"
    often = sorted(phase.waits.items(), key=lambda entry: -entry[1])
    for place, number in often[:_LISTED]:
        yield f"    waits {number} x: {place}"
    graphs = sum(shape.startswith("cuDNN") for shape in phase.attention)
    if graphs:
        yield f"    {graphs} graphs of cuDNN's attention, each built once"
    for place, number in phase.complaints.items():
        yield f"    A GPU REFUSES {number} x: {place}"


def _seconds(ceilings: Ceilings, found: Estimate) -> Iterator[str]:
    yield "  Seconds from the ceilings (an estimate from below; nothing overlaps, nothing waits):"
    for name, cost in found.costs.items():
        yield (
            f"    {name}: {found.seconds[name]:.2f} (kernels {cost.device:.2f}, communication "
            f"{cost.communication:.2f}, launches {cost.kernels * ceilings.launch:.2f})"
        )
    yield (
        f"    together {sum(found.seconds.values()):.2f}: {found.tokens_per_second:,.0f} tokens/s "
        f"on all ranks, {100 * found.mfu:.0f}% of an H100's peak"
    )


def failures(ranks: Sequence[Rank]) -> list[str]:
    """Say in one sentence each which ranks did not reach the end."""
    return [f"rank {rank.rank}: {rank.status}" for rank in ranks if rank.status != "ok"]


def refusals(ranks: Sequence[Rank]) -> list[str]:
    """Say what a GPU would refuse."""
    return [
        f"rank {rank.rank}, {name}: {place}"
        for rank in ranks
        for name, phase in rank.phases.items()
        for place in phase.complaints
    ]
