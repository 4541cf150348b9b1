"""How a run is started, planned and simulated."""

import math
import re
from dataclasses import dataclass

from megatron_espo.errors import UserError


@dataclass(frozen=True)
class LaunchConfig:
    """Where flags come from, and whether to train or only to plan."""

    recipe: str | None = None
    """Recipe (megatron_espo/recipes/NAME.flags, or a file) that stands for its flags; what follows
    on the command line wins, and several recipes may be given."""

    verbose: bool = False
    """Show all that Megatron and PyTorch say on the console, too. By default it goes only into
    SAVE/logs/rank-N.log."""

    dry_run: bool = False
    """Check everything, print the memory and operations of the plan, start nothing; needs no
    GPU."""

    dry_run_world_size: int | None = None
    """GPUs that a dry run plans for. Default: WORLD_SIZE under torchrun, else NNODES (1) x
    GPUS_PER_NODE (8)."""

    dry_run_gpu_memory: float = 80.0
    """Memory of one GPU in a dry run's plan, in GB (10^9 bytes)."""

    simulate: bool = False
    """With --dry-run: run the real job as one or several of its ranks on GPUs that are not there,
    and print memory, collectives, waits and a roofline by phase; see --simulate-*."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.dry_run_world_size is not None and self.dry_run_world_size < 1:
            raise UserError(
                f"--dry-run-world-size {self.dry_run_world_size}: a plan needs at least 1 GPU."
            )
        if self.simulate and not self.dry_run:
            raise UserError("--simulate is a kind of dry run; add --dry-run.")
        if not 0.0 < self.dry_run_gpu_memory < math.inf:
            raise UserError(
                f"--dry-run-gpu-memory {self.dry_run_gpu_memory} must be a positive number of GB."
            )


@dataclass(frozen=True)
class SimulateConfig:
    """What --dry-run --simulate runs, and the ceilings of its roofline."""

    ranks: str | None = None
    """Ranks to simulate, as 0,4,7. Default: rank 0 and, with pipeline stages, the first ranks of
    the middle and the last stage."""

    compare: bool = False
    """Also compare the collectives of the ranks with each other: all ranks of up to 16, of more
    those of the first two and the last copy of the model."""

    processes: int = 1
    """Ranks that are simulated at a time, each on one core."""

    out: str | None = None
    """File for all that was found, as JSON."""

    matmul_tflops: float = 650.0
    """Ceiling of bf16 matrix products in TFLOP/s; FP8 counts twice."""

    memory_tbs: float = 2.6
    """Ceiling of the GPU's memory in TB/s."""

    nvlink_gbs: float = 350.0
    """Ceiling of the links inside a node in GB/s and direction, per GPU."""

    network_gbs: float = 45.0
    """Ceiling of the network between nodes in GB/s and direction, per GPU."""

    launch_us: float = 4.0
    """Microseconds that the host needs to launch a kernel."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.ranks is not None and not re.fullmatch(r"\d+(,\d+)*", self.ranks):
            raise UserError(f"--simulate-ranks {self.ranks}: give rank numbers, as 0,4,7.")
        if self.processes < 1:
            raise UserError(f"--simulate-processes {self.processes} must be at least 1.")
        for name in ("matmul_tflops", "memory_tbs", "nvlink_gbs", "network_gbs", "launch_us"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                flag = name.replace("_", "-")
                raise UserError(f"--simulate-{flag} {value} must be a positive number.")
