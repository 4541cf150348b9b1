"""Where the loop hands over what it has to report: TensorBoard, warnings, hardware."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import ArrayLike

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.console import say
from megatron_espo.monitor.flops import ModelDimensions, passed_flops, rollout_flops
from megatron_espo.monitor.hardware import GpuMonitor, gather_hardware, local_hardware
from megatron_espo.monitor.tensorboard import log_histograms, write_histograms, write_scalars
from megatron_espo.monitor.throughput import throughput_scalars
from megatron_espo.monitor.watch import Watch


@dataclass(frozen=True)
class Dashboard:
    """The reports of one run, on every rank; only the reporting one shows them.

    Attributes:
        writer: a SummaryWriter on the reporting rank, else None.
        wandb: the module wandb on the reporting rank with --wandb-project, else None.
        is_reporter: whether this rank prints.
        watch: notices what is wrong.
        gpu: this rank's GPU, or None.
        dimensions: the model, for counting operations; None reports none.
        devices: number of ranks.
        peak: TFLOP/s of one device, or None.
    """

    writer: Any = None
    wandb: Any = None
    is_reporter: bool = False
    watch: Watch = field(default_factory=Watch)
    gpu: GpuMonitor | None = None
    dimensions: ModelDimensions | None = None
    devices: int = 1
    peak: float | None = None

    def report(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers, and warn of those that look wrong.

        Args:
            scalars: equal on all ranks.
            step: optimizer steps done.
        """
        warnings = self.watch.look(scalars)
        numbers = {**scalars, **warnings.scalars}
        write_scalars(self.writer, numbers, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)
        for name, message in warnings.messages.items():
            if self.writer is not None:
                self.writer.add_text(f"warnings/{name}", message, step)
            if self.is_reporter:
                say(f"warning: step {step}: {message}")

    def histograms(self, columns: Mapping[str, ArrayLike], step: int) -> None:
        """Write distributions."""
        write_histograms(self.writer, columns, step)
        if self.wandb is not None:
            log_histograms(self.wandb, columns, step)

    def hardware(self) -> dict[str, float]:
        """Read the hardware of all ranks since the last call; all ranks call this together."""
        return gather_hardware(local_hardware(self.gpu))

    def throughput(
        self,
        positions: int,
        espo: EspoConfig,
        rollout: RolloutConfig,
        seconds: Mapping[str, float],
        left_out: Sequence[float],
        work: Sequence[float],
    ) -> dict[str, float]:
        """Count a rollout's operations and relate them to its seconds.

        Args:
            positions: padded width of a row.
            espo: the run's settings.
            rollout: sampling settings.
            seconds: of this rank, by phase.
            left_out: of each optimizer step that these seconds cover, the share of completions
                that had no backward pass.
            work: what sampling passed through the model, summed over all completions (see
                generation.sampler.Generation).

        Returns:
            See :func:`megatron_espo.monitor.throughput.throughput_scalars`.
        """
        if self.dimensions is None:
            return {}
        flops = rollout_flops(
            self.dimensions, positions, espo, rollout, sum(left_out) / max(len(left_out), 1)
        )
        flops = replace(flops, generation=passed_flops(self.dimensions, *work))
        share = len(left_out) / espo.updates_per_rollout
        return throughput_scalars(flops, seconds, share, self.devices, self.peak)
