"""What a run reports, and which checkpoints stay."""

import math
from dataclasses import dataclass

from megatron_espo.errors import UserError


@dataclass(frozen=True)
class MonitorConfig:
    """What a run reports."""

    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, against which MFU is measured. Default: from a table by the
    GPU's name (monitor/throughput.py); unknown devices, CPUs and float32 get no MFU."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.peak_tflops is not None and not 0.0 < self.peak_tflops < math.inf:
            raise UserError(
                f"--monitor-peak-tflops {self.peak_tflops} is no speed; give a device's peak in "
                "TFLOP/s or leave it out."
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints of a run stay."""

    keep_last: int = 0
    """Newest checkpoints that stay; older ones are removed after each save, apart from multiples of
    --save-retain-interval and the best. 0 keeps all, or just one with --save-retain-interval."""

    keep_best: bool = False
    """ESPO: save after each evaluation with the highest held-out accuracy so far, and keep that
    checkpoint; SAVE/best_checkpoint.json names it."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: naming the flag.
        """
        if self.keep_last < 0:
            raise UserError(
                f"--save-keep-last {self.keep_last} must be a number of checkpoints, or 0 for all."
            )
