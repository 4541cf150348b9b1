"""Whether the ranks of a job would wait for each other for ever.

Ranks of a group must make the same collectives in the same order: kind, bytes and element type. A
send must meet a receive of the same size. And what blocks must come in an order that all can keep.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest

from megatron_espo.dry_run.record import Collective, Rank


def members(group: str) -> list[int]:
    """Global ranks of a group by its name (see ``collectives``)."""
    return [int(rank) for rank in group.removeprefix("host ").partition("#")[0].split(",")]


def find_mismatch(ranks: Sequence[Rank]) -> str | None:
    """Compare the ranks that were simulated.

    Args:
        ranks: with their traces. Groups are compared as far as their ranks are among these.

    Returns:
        The first disagreement, with both places in the source, or None.
    """
    sequences: dict[str, dict[int, list[Collective]]] = defaultdict(dict)
    sends: dict[tuple[str, int, int], dict[str, list[Collective]]] = defaultdict(
        lambda: {"send": [], "recv": []}
    )
    for rank in ranks:
        own: dict[str, list[Collective]] = defaultdict(list)
        for entry in rank.trace:
            kind, _, peer = entry.kind.partition(" ")
            if kind in ("send", "recv"):
                other = members(entry.group)[int(peer)]
                pair = (rank.rank, other) if kind == "send" else (other, rank.rank)
                sends[(entry.group, *pair)][kind].append(entry)
            else:
                own[entry.group].append(entry)
        for group in {entry.group for entry in rank.trace} | set(own):
            sequences[group][rank.rank] = own[group]
    simulated = {rank.rank for rank in ranks}
    return (
        _of_groups(sequences, simulated)
        or _of_pairs(sends, simulated)
        or _of_order(ranks, simulated)
    )


def _of_groups(
    sequences: dict[str, dict[int, list[Collective]]], simulated: set[int]
) -> str | None:
    for group, by_rank in sequences.items():
        present = [rank for rank in members(group) if rank in simulated]
        first = present[0]
        expected = by_rank.get(first, [])
        for rank in present[1:]:
            difference = _difference(expected, by_rank.get(rank, []), _what)
            if difference is not None:
                number, ours, theirs = difference
                return (
                    f"ranks {first} and {rank} disagree in collective {number} of their "
                    f"group {members(group)}: {_named(ours)}; {_named(theirs)}"
                )
    return None


def _of_pairs(
    sends: dict[tuple[str, int, int], dict[str, list[Collective]]], simulated: set[int]
) -> str | None:
    for (_, source, target), both in sends.items():
        if not {source, target} <= simulated:
            continue
        difference = _difference(both["send"], both["recv"], _size)
        if difference is not None:
            number, ours, theirs = difference
            return (
                f"message {number} from rank {source} to rank {target} does not match: "
                f"{_named(ours)}; {_named(theirs)}"
            )
    return None


def _difference(
    ours: Sequence[Collective], theirs: Sequence[Collective], of: Callable[[Collective], object]
) -> tuple[int, Collective | None, Collective | None] | None:
    """Find the first place, counted from 1, where two sequences differ; None stands for an end."""
    for number, (mine, other) in enumerate(zip_longest(ours, theirs), start=1):
        if mine is None or other is None or of(mine) != of(other):
            return number, mine, other
    return None


def _of_order(ranks: Sequence[Rank], simulated: set[int]) -> str | None:
    """Play the sequences: a collective passes when all its ranks have come to it.

    Messages between stages and what a group's absent ranks would join pass at once. Sequences that
    agree group by group can still block each other, where two groups come in turn.
    """
    traces = {
        rank.rank: [
            entry
            for entry in rank.trace
            if not entry.kind.startswith(("send", "recv"))
            and set(members(entry.group)) <= simulated
            and len(members(entry.group)) > 1
        ]
        for rank in ranks
    }
    places = dict.fromkeys(traces, 0)

    def head(rank: int) -> Collective | None:
        trace = traces[rank]
        return trace[places[rank]] if places[rank] < len(trace) else None

    waiting = set(traces)
    while waiting:
        moved = False
        for rank in sorted(waiting):
            entry = head(rank)
            if entry is None:
                waiting.discard(rank)
                continue
            group = members(entry.group)
            heads = [head(other) for other in group]
            if all(other is not None and other.group == entry.group for other in heads):
                for other in group:
                    places[other] += 1
                moved = True
        if not moved and waiting:
            first = min(waiting)
            entry = head(first)
            assert entry is not None
            other = next(
                r for r in members(entry.group) if (h := head(r)) is None or h.group != entry.group
            )
            return (
                f"ranks {first} and {other} wait for each other: {_named(entry)}; "
                f"{_named(head(other))}"
            )
    return None


def _what(entry: Collective) -> tuple[str, int, str]:
    return entry.kind, entry.size, entry.dtype


def _size(entry: Collective) -> tuple[int, str]:
    return entry.size, entry.dtype


def _named(entry: Collective | None) -> str:
    if entry is None:
        return "nothing there"
    what = f"{entry.kind} of {entry.size:,} bytes {entry.dtype}".strip()
    return f"{what} at {entry.place}"
