"""Seconds of an operation from the ceilings of a GPU: an estimate from below, not a measurement."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """What a GPU and its links reach at best.

    Attributes:
        matmul: floating-point operations per second of bf16 matrix products; FP8 does twice.
        memory: bytes per second of the GPU's memory.
        nvlink: bytes per second and direction between the GPUs of a node.
        network: bytes per second and direction of each GPU between nodes.
        launch: seconds that the host needs to launch a kernel.
    """

    matmul: float = 650e12
    memory: float = 2.6e12
    nvlink: float = 350e9
    network: float = 45e9
    launch: float = 4e-6

    def kernel(self, flops: float, moved: float, *, fp8: bool = False) -> float:
        """Seconds of a kernel: the longer of arithmetic and memory.

        Args:
            flops: floating-point operations.
            moved: bytes read and written.
            fp8: whether it multiplies in FP8.
        """
        return max(flops / (self.matmul * (2 if fp8 else 1)), moved / self.memory)

    def collective(self, kind: str, ranks: int, size: int, *, one_node: bool) -> float:
        """Seconds of a ring collective, latency left out.

        Args:
            kind: as in ``collectives.KINDS``.
            ranks: ranks of the group.
            size: bytes of the whole (gathered or unreduced) tensor.
            one_node: whether the group lies inside one node.
        """
        if ranks < 2 or size == 0:
            return 0.0
        share = (ranks - 1) / ranks
        factor = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share}
        rate = self.nvlink if one_node else self.network
        return factor.get(kind, 1.0) * size / rate
