"""What a simulation found, in words and tables."""

from collections.abc import Iterator, Mapping, Sequence

from megatron_espo.simulate.extrapolate import Cost
from megatron_espo.simulate.job import Job
from megatron_espo.simulate.record import Phase, Rank

GB = 1e9
# Parts of the peak, waits and collectives that are listed.
_LISTED = 6


def report(
    job: Job, rank: Rank, costs: Mapping[str, Cost], tokens: float, peak_tflops: float
) -> str:
    """Describe a rank that ran to its end.

    Args:
        job: what was asked for.
        rank: what it did.
        costs: extrapolated to the whole rollout or step, by phase.
        tokens: that the job makes or trains on in that time, on all ranks.
        peak_tflops: of a GPU, for the share that is used.

    Returns:
        Lines.
    """
    engine = rank.facts["transformer_engine"]
    layers = f"Transformer Engine {engine}'s Python layer" if engine else "plain layers"
    lines = [
        f"Simulated rank {rank.rank} of {job.world_size}: {rank.status} "
        f"({layers}; {rank.wall:.0f} s and {rank.host_memory / GB:.1f} GB of this machine)",
        f"  pinned host memory {rank.pinned / GB:.2f} GB; alive at the end "
        f"{rank.lasting / GB:.2f} GB",
    ]
    for name, phase in rank.phases.items():
        if phase.kernels:
            lines += _phase(name, phase)
    if costs:
        lines += list(_seconds(job, costs, tokens, peak_tflops))
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
    for place, number in phase.complaints.items():
        yield f"    A GPU REFUSES {number} x: {place}"


def _seconds(
    job: Job, costs: Mapping[str, Cost], tokens: float, peak_tflops: float
) -> Iterator[str]:
    ceilings = job.ceilings
    yield "  Seconds from the ceilings (an estimate from below; nothing overlaps, nothing waits):"
    total, flops = 0.0, 0.0
    for name, cost in costs.items():
        seconds = cost.seconds(ceilings)
        total += seconds
        flops += cost.flops
        yield (
            f"    {name}: {seconds:.2f} (kernels {cost.device:.2f}, communication "
            f"{cost.communication:.2f}, launches {cost.kernels * ceilings.launch:.2f})"
        )
    if total > 0:
        share = flops / total / (peak_tflops * 1e12)
        yield (
            f"    together {total:.2f}: {tokens / total:,.0f} tokens/s on all ranks, "
            f"{100 * share:.0f}% of {peak_tflops:.0f} TFLOP/s"
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
