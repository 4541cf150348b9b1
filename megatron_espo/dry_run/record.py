"""What a simulated rank did, phase by phase: plain numbers that travel as JSON."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Phase:
    """One phase of a run on one rank.

    Attributes:
        peak: most bytes of the GPU alive at a time.
        parts: bytes alive at the peak by ``[phase that made them, place]``.
        kernels: operations that launch a kernel.
        operations: kernels by name.
        flops: floating-point operations of matrix products and attention.
        moved: bytes that kernels read and write.
        seconds: roofline of the kernels, see ``roofline.Ceilings``.
        communication: roofline of the collectives, nothing overlapped, by label of the group.
        collectives: ``[count, bytes]`` by ``kind/label/ranks``.
        waits: waits of the host for the device by kind and place.
        to_device: copies and bytes from the host.
        to_host: copies and bytes to the host.
        attention: passes of an attention kernel by rows x queries x keys and mode.
        complaints: what a GPU would refuse, by place.
        unknown: values that the host read and the simulation cannot know, by place.
        units: what was done, such as denoising steps or micro-batches.
        entered: how often the phase began.
        wall: seconds that the simulation itself took.
    """

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    kernels: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0
    communication: dict[str, float] = field(default_factory=dict)
    collectives: dict[str, list[int]] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    to_device: list[int] = field(default_factory=lambda: [0, 0])
    to_host: list[int] = field(default_factory=lambda: [0, 0])
    attention: dict[str, int] = field(default_factory=dict)
    complaints: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    entered: int = 0
    wall: float = 0.0

    @property
    def num_waits(self) -> int:
        """Waits of the host for the device."""
        return sum(self.waits.values())


@dataclass
class Collective:
    """One entry of the sequence that the ranks of a group must agree on.

    Attributes:
        group: its global ranks, and which of several groups of these ranks it is.
        kind: see ``collectives.KINDS``.
        size: bytes.
        dtype: element type; empty for objects and barriers.
        place: where the call stands in the source.
    """

    group: str
    kind: str
    size: int
    dtype: str
    place: str


@dataclass
class Rank:
    """A simulated rank.

    Attributes:
        rank: its number.
        status: ``ok``, or the error that ended it.
        phases: by name, in the order of their first use.
        trace: its collectives in order.
        pinned: bytes of pinned host memory, as PyTorch's allocator rounds them.
        lasting: bytes alive at the end of the run.
        steps: per denoising step of the rollout, its cost; see ``jobs``.
        facts: settings that the report needs.
        host_memory: peak bytes of the simulating process.
        wall: its seconds.
        traceback: of an unexpected error.
    """

    rank: int
    status: str = "ok"
    phases: dict[str, Phase] = field(default_factory=dict)
    trace: list[Collective] = field(default_factory=list)
    pinned: int = 0
    lasting: int = 0
    steps: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    host_memory: int = 0
    wall: float = 0.0
    traceback: str = ""

    @property
    def peak(self) -> tuple[str, int]:
        """The phase with the most bytes alive at a time, and these."""
        name = max(self.phases, key=lambda phase: self.phases[phase].peak)
        return name, self.phases[name].peak

    def as_json(self) -> dict[str, Any]:
        """Return plain dicts and lists; the trace's repeated words stand once."""
        words: dict[str, int] = {}

        def number(word: str) -> int:
            return words.setdefault(word, len(words))

        rows = [
            [number(c.group), number(c.kind), c.size, number(c.dtype), number(c.place)]
            for c in self.trace
        ]
        plain = dataclasses.asdict(dataclasses.replace(self, trace=[]))
        return {**plain, "trace": rows, "words": list(words)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Rank":
        """Read what :meth:`as_json` wrote."""
        words = plain.pop("words")
        trace = [
            Collective(words[group], words[kind], size, words[dtype], words[place])
            for group, kind, size, dtype, place in plain.pop("trace")
        ]
        phases = {name: Phase(**phase) for name, phase in plain.pop("phases").items()}
        return cls(**plain, trace=trace, phases=phases)
