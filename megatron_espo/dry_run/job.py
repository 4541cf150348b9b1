"""A job to simulate, as it travels to the simulating process: plain values, JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_espo.dry_run.roofline import Ceilings

# Stands in a job's flags for a folder that each rank has for itself: what one writes, another one,
# which runs later, must not take for its own past.
OWN_FOLDER = "@rank"
# Fingerprint of a base that is not there.
SIMULATED_BASE = "simulated"


@dataclass(frozen=True)
class Job:
    """What to run, and as which ranks.

    Attributes:
        target: a module of this package or the path of a start script, as it would be started.
        flags: its command line.
        world_size: ranks of the job.
        gpus_per_node: of each node.
        ranks: ranks to simulate.
        folder: results, one file a rank, and whatever the job writes.
        ceilings: of a GPU.
        denoising_steps: steps of a rollout that are run; the others are extrapolated.
        micro_batches: micro-batches of an update that are run.
        updates: optimizer steps that are run.
        record_trace: whether to keep each rank's sequence of collectives.
        processes: ranks at a time.
        repeat: whether experts that do the same are run once; the books are the same without it.
    """

    target: str
    flags: list[str]
    world_size: int
    gpus_per_node: int
    ranks: list[int]
    folder: str
    ceilings: Ceilings = field(default_factory=Ceilings)
    denoising_steps: int = 5
    micro_batches: int = 2
    updates: int = 2
    record_trace: bool = False
    processes: int = 1
    repeat: bool = True

    @property
    def is_script(self) -> bool:
        """Whether a start script is run, as torchrun runs it."""
        return self.target.endswith(".sh")

    def write(self, path: Path) -> None:
        """Write the job to a file."""
        path.write_text(json.dumps(dataclasses.asdict(self)), "utf-8")

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read what :meth:`write` wrote."""
        plain: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return cls(**{**plain, "ceilings": Ceilings(**plain["ceilings"])})
